"""Disk to arena: bounded threads that read byte ranges to where they belong, and digest what then lies there.

The only file of the loader with threads. An extent is mapped while it is filled and no longer. All that takes time
releases the GIL.
"""

import asyncio
import mmap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import xxhash

from services.loader.reads import plan_reads
from services.loader.source import SourceFile, Target, forget
from services.params.layout import PAGE
from services.params.owned_arena import OwnedArena
from services.params.specs import Checkpoint, TensorSpec

CHUNK_BYTES = 8 << 20
_T = TypeVar("_T")


class Pace:
    """A cap on bytes a second, shared by all threads; `stop` wakes whoever waits, and nobody passes after it."""

    def __init__(self, bytes_per_second: int | None) -> None:
        self._rate = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._stopped = threading.Event()

    @property
    def chunk_bytes(self) -> int:
        """Reads of a slow fill are small, so that its rate is even."""
        return min(CHUNK_BYTES, max(PAGE, self._rate // 16)) if self._rate else CHUNK_BYTES

    def take(self, size_bytes: int) -> None:
        """Wait until `size_bytes` may be read. Raises FillStopped."""
        delay = 0.0
        if self._rate:
            with self._lock:
                now = time.monotonic()
                self._free_at = max(self._free_at, now) + size_bytes / self._rate
                delay = self._free_at - now
        if self._stopped.is_set() or (delay and self._stopped.wait(delay)):
            raise FillStopped

    def stop(self) -> None:
        self._stopped.set()


class FillStopped(Exception):  # noqa: N818 - nothing went wrong
    """The loader stops; the extent stays unfinished."""


class Filler:
    """Runs fills and digests on `thread_count` threads; awaited from the event loop, `close` joins them."""

    def __init__(self, thread_count: int, max_rate: int | None = None, is_buffered: bool = False) -> None:
        self.thread_count = thread_count
        self._threads = ThreadPoolExecutor(thread_count, thread_name_prefix="fill")
        self._buffers = Buffers()
        self._pace = Pace(max_rate)
        self._is_buffered = is_buffered

    async def fill(
        self, arena: OwnedArena, checkpoint: Checkpoint, specs: Mapping[str, TensorSpec], extent: int
    ) -> int:
        """Fill one extent and publish it; the bytes read.

        Raises CheckpointChanged if a file is not what its header was read from, BadCheckpoint if it cannot be read.
        """
        return await self.run(lambda: self._fill(arena, checkpoint, specs, extent))

    async def digest(self, arena: OwnedArena, extent: int) -> bytes:
        """Digest of an extent's bytes as they are in memory now."""
        return await self.run(lambda: self._digest(arena, extent))

    def forget(self, checkpoint: Checkpoint) -> None:
        """Soon leave nothing of the files in the page cache, now that all that was wanted of them is in memory."""
        for file in checkpoint.files:
            self._threads.submit(forget, file.path)

    async def run(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def stop(self) -> None:
        """Make running fills raise FillStopped soon."""
        self._pace.stop()

    def close(self) -> None:
        self.stop()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _fill(self, arena: OwnedArena, checkpoint: Checkpoint, specs: Mapping[str, TensorSpec], extent: int) -> int:
        reads = list(plan_reads(specs, arena.header.layout, extent, self._pace.chunk_bytes))
        begin = arena.header.layout.extents[extent].offset
        with ExitStack() as stack:
            used = dict.fromkeys(read.file for read in reads)
            sources = {n: stack.enter_context(SourceFile(checkpoint.files[n], self._is_buffered)) for n in used}
            staging = stack.enter_context(self._buffers.one())
            memory = stack.enter_context(arena.window(extent))
            for read in reads:
                self._pace.take(read.size_bytes)
                targets = [Target(p.at, memory[p.target - begin :][: p.size_bytes]) for p in read.pieces]
                sources[read.file].read(read.offset, read.size_bytes, targets, staging)
            for source in sources.values():
                source.check()
            digest = xxhash.xxh3_128_digest(memory)
        arena.publish(extent, digest)
        return sum(read.size_bytes for read in reads)

    def _digest(self, arena: OwnedArena, extent: int) -> bytes:
        self._pace.take(0)
        with arena.window(extent) as memory:
            return xxhash.xxh3_128_digest(memory)


class Buffers:
    """Page-aligned memory for reads, used again while fills go on and given back when none does."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._idle: list[memoryview] = []
        self._lent_count = 0

    @contextmanager
    def one(self) -> Iterator[memoryview]:
        """A buffer for a chunk, and for the pages that a read is widened to."""
        with self._mutex:
            self._lent_count += 1
            buffer = self._idle.pop() if self._idle else _new_buffer()
        try:
            yield buffer
        finally:
            with self._mutex:
                self._lent_count -= 1
                self._idle.append(buffer)
                if not self._lent_count:
                    self._idle.clear()


def _new_buffer() -> memoryview:
    memory = mmap.mmap(-1, CHUNK_BYTES + 2 * PAGE)
    memory.madvise(mmap.MADV_DONTDUMP)  # it holds weights
    return memoryview(memory)
