"""Disk to arena: bounded threads that read byte ranges, write them where they belong, and digest what they wrote.

The only file of the loader with threads. A read goes to a page-aligned staging buffer, since checkpoint offsets are
not aligned and O_DIRECT wants them to be; from there `pwrite` puts it into the arena. Both calls release the GIL.
"""

import asyncio
import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

import xxhash

from services.errors import BadCheckpoint, CheckpointChanged
from services.params.arena import OwnedArena
from services.params.checkpoint import Checkpoint, CheckpointFile, FileIdentity, TensorSpec
from services.params.layout import PAGE, Layout, round_up

CHUNK_BYTES = 8 << 20
_ZEROS = bytes(PAGE)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that are contiguous in the file and in the arena: `at` in their read, `target` in the data."""

    at: int
    target: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Read:
    """One contiguous range of one file and where its pieces go."""

    file: int
    offset: int
    size_bytes: int
    pieces: tuple[Piece, ...]


def plan_reads(specs: Mapping[str, TensorSpec], layout: Layout, extent: int, chunk_bytes: int) -> Iterator[Read]:
    """The reads that fill an extent, in the order of the arena, each at most `chunk_bytes`."""
    file, start, size = -1, 0, 0
    pieces: list[Piece] = []
    for source, offset, target, length in _chunks(specs, layout, extent, chunk_bytes):
        if pieces and (source != file or offset != start + size or size + length > chunk_bytes):
            yield Read(file, start, size, tuple(pieces))
            pieces = []
        if not pieces:
            file, start, size = source, offset, 0
        if pieces and pieces[-1].target + pieces[-1].size_bytes == target:
            last = pieces.pop()
            pieces.append(Piece(last.at, last.target, last.size_bytes + length))
        else:
            pieces.append(Piece(size, target, length))
        size += length
    if pieces:
        yield Read(file, start, size, tuple(pieces))


def _chunks(
    specs: Mapping[str, TensorSpec], layout: Layout, extent: int, chunk_bytes: int
) -> Iterator[tuple[int, int, int, int]]:
    for tensor in layout.tensors:
        if tensor.extent == extent:
            spec = specs[tensor.name]
            for done in range(0, tensor.size_bytes, chunk_bytes):
                length = min(chunk_bytes, tensor.size_bytes - done)
                yield spec.file, spec.offset + done, tensor.offset + done, length


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


class SourceFile:
    """A checkpoint file open for reading, proven to be the one whose header was read."""

    def __init__(self, file: CheckpointFile, is_buffered: bool) -> None:
        self._file = file
        self._is_buffered = is_buffered

    def __enter__(self) -> "SourceFile":
        try:
            self._fd = self._open()
        except FileNotFoundError as error:
            raise CheckpointChanged(f"{self._file.path.name} was removed while it was read") from error
        except OSError as error:
            raise self._bad(error) from error
        try:
            self.check()
        except CheckpointChanged:
            os.close(self._fd)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._fd)

    def check(self) -> None:
        """Raises CheckpointChanged unless the file is in the state in which its header was read."""
        if FileIdentity.of(os.fstat(self._fd)) != self._file.identity:
            raise CheckpointChanged(f"{self._file.path.name} changed while it was read: ask again when it is complete")

    def read(self, staging: memoryview, offset: int, size_bytes: int) -> memoryview:
        """Bytes of the file, in `staging`; the read is widened to whole pages."""
        start = offset // PAGE * PAGE
        end = round_up(offset + size_bytes, PAGE)
        have = 0
        while have < offset + size_bytes - start:
            try:
                count = os.preadv(self._fd, [staging[have : end - start]], start + have)
            except OSError as error:
                raise self._bad(error) from error
            if not count:
                raise CheckpointChanged(f"{self._file.path.name} became shorter while it was read")
            have += count
        if self._is_buffered:
            os.posix_fadvise(self._fd, start, end - start, os.POSIX_FADV_DONTNEED)
        return staging[offset - start : offset - start + size_bytes]

    def _open(self) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC
        if not self._is_buffered:
            try:
                return os.open(self._file.path, flags | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._is_buffered = True  # a file system without O_DIRECT
        return os.open(self._file.path, flags)

    def _bad(self, error: OSError) -> BadCheckpoint:
        return BadCheckpoint(f"{self._file.path.name} cannot be read: {os.strerror(error.errno or 0)}")
