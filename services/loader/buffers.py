"""Memory that reads go through on their way to an arena."""

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from services.loader.pace import CHUNK_BYTES
from services.params.layout import PAGE


class Buffers:
    """Page-aligned memory for reads, used again while fills go on and given back when none does."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._idle: list[memoryview] = []
        self._user_count = 0

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A fill goes on inside the block: what its reads give back is kept for the next ones."""
        with self._mutex:
            self._user_count += 1
        try:
            yield
        finally:
            with self._mutex:
                self._user_count -= 1
                if not self._user_count:
                    self._idle.clear()

    @contextmanager
    def one(self) -> Iterator[memoryview]:
        """A buffer for a chunk, and for the pages that a read is widened to."""
        with self._mutex:
            buffer = self._idle.pop() if self._idle else _new_buffer()
        try:
            yield buffer
        finally:
            with self._mutex:
                if self._user_count:
                    self._idle.append(buffer)


def _new_buffer() -> memoryview:
    memory = mmap.mmap(-1, CHUNK_BYTES + 2 * PAGE)
    memory.madvise(mmap.MADV_DONTDUMP)  # it holds weights
    return memoryview(memory)
