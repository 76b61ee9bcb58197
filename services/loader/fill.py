"""Disk to arena: bounded threads that read byte ranges, write them where they belong, and digest what they wrote.

The only file of the loader with threads. A read goes to a page-aligned staging buffer, since checkpoint offsets are
not aligned and O_DIRECT wants them to be; from there `pwrite` puts it into the arena. Both calls release the GIL.
"""

import asyncio
import mmap
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

import xxhash

from services.loader.reads import plan_reads
from services.loader.source import SourceFile
from services.params.arena import OwnedArena
from services.params.layout import PAGE
from services.params.specs import Checkpoint, TensorSpec

CHUNK_BYTES = 8 << 20
_ZEROS = bytes(PAGE)
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
        self._local = threading.local()
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

    async def run(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def stop(self) -> None:
        """Make running fills raise FillStopped soon."""
        self._pace.stop()

    def close(self) -> None:
        self.stop()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _fill(self, arena: OwnedArena, checkpoint: Checkpoint, specs: Mapping[str, TensorSpec], extent: int) -> int:
        layout = arena.header.layout
        reads = list(plan_reads(specs, layout, extent, self._pace.chunk_bytes))
        digest, count = xxhash.xxh3_128(), 0
        end = layout.extents[extent].offset
        with ExitStack() as stack:
            used = dict.fromkeys(read.file for read in reads)
            sources = {n: stack.enter_context(SourceFile(checkpoint.files[n], self._is_buffered)) for n in used}
            for read in reads:
                self._pace.take(read.size_bytes)
                data = sources[read.file].read(self._staging(), read.offset, read.size_bytes)
                for piece in read.pieces:
                    view = data[piece.at : piece.at + piece.size_bytes]
                    digest.update(_ZEROS[: piece.target - end])
                    digest.update(view)
                    arena.write(piece.target, view)
                    end = piece.target + piece.size_bytes
                count += read.size_bytes
            for source in sources.values():
                source.check()
        digest.update(_ZEROS[: layout.extents[extent].offset + layout.extents[extent].size_bytes - end])
        arena.publish(extent, digest.digest())
        return count

    def _digest(self, arena: OwnedArena, extent: int) -> bytes:
        place, digest, staging = arena.header.layout.extents[extent], xxhash.xxh3_128(), self._staging()
        for done in range(0, place.size_bytes, CHUNK_BYTES):
            self._pace.take(0)
            view = staging[: min(CHUNK_BYTES, place.size_bytes - done)]
            arena.read_into(place.offset + done, view)
            digest.update(view)
        return digest.digest()

    def _staging(self) -> memoryview:
        """This thread's buffer: anonymous memory, hence page-aligned."""
        if not hasattr(self._local, "staging"):
            self._local.staging = memoryview(mmap.mmap(-1, CHUNK_BYTES + 2 * PAGE))
        staging: memoryview = self._local.staging
        return staging
