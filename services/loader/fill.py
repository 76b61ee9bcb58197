"""Disk to arena, on bounded threads. All that takes time releases the GIL.

The only file of the loader with threads of its own; what they do for an extent is in extent_fill.py.
"""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import xxhash

from services.loader.buffers import Buffers
from services.loader.extent_fill import ExtentFill, Means
from services.loader.pace import CHUNK_BYTES, Pace
from services.loader.reads import Read
from services.loader.source import forget
from services.params.layout import EXTENT_BYTES
from services.params.owned_arena import OwnedArena
from services.params.specs import Checkpoint, TensorSpec

# Of an extent of the usual size: so many threads are at work on one.
_READS_AT_ONCE = EXTENT_BYTES // CHUNK_BYTES
_T = TypeVar("_T")


class Filler:
    """Runs fills and digests on `thread_count` threads; awaited from the event loop, `close` joins them."""

    def __init__(self, thread_count: int, max_rate: int | None = None, is_buffered: bool = False) -> None:
        self.thread_count = thread_count
        self.fill_limit = 2 + thread_count // _READS_AT_ONCE
        self._threads = ThreadPoolExecutor(thread_count, thread_name_prefix="fill")
        self._means = Means(Pace(max_rate), Buffers(), is_buffered)

    async def fill(
        self, arena: OwnedArena, checkpoint: Checkpoint, specs: Mapping[str, TensorSpec], extent: int
    ) -> int:
        """Fill one extent and publish it; the bytes read.

        Raises CheckpointChanged if a file is not what its header was read from, BadCheckpoint if it cannot be read.
        """
        extent_fill = ExtentFill(arena, checkpoint, specs, extent, self._means)
        reads = await self.run(extent_fill.open)
        # Threads take these in turn: extents are done one after the other, each with all the disk gives.
        ended = await asyncio.gather(*(self._reading(extent_fill, read) for read in reads), return_exceptions=True)
        for error in ended:
            if error is not None:
                raise error
        return sum(read.size_bytes for read in reads)

    def _reading(self, extent_fill: ExtentFill, read: Read) -> asyncio.Future[None]:
        future = self._threads.submit(extent_fill.read, read)
        future.add_done_callback(lambda done: extent_fill.skip() if done.cancelled() else None)
        return asyncio.wrap_future(future)

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
        self._means.pace.stop()

    def close(self) -> None:
        self.stop()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _digest(self, arena: OwnedArena, extent: int) -> bytes:
        self._means.pace.take(0)
        with arena.window(extent) as memory:
            return xxhash.xxh3_128_digest(memory)
