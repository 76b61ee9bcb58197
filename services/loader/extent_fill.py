"""One extent on its way from disk: its reads run on any threads, in any order; the last of them publishes it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

import xxhash

from services.loader.buffers import Buffers
from services.loader.pace import FillStopped, Pace
from services.loader.reads import Piece, Read, plan_reads
from services.loader.source import SourceFile, Target, share_out
from services.params.owned_arena import OwnedArena
from services.params.specs import Checkpoint, TensorSpec


@dataclass(frozen=True, slots=True)
class Means:
    """What all fills of a loader share."""

    pace: Pace
    buffers: Buffers
    is_buffered: bool


class ExtentFill:
    """`open` first; then `read` for each of the reads that it gives, whatever becomes of the others."""

    def __init__(
        self,
        arena: OwnedArena,
        checkpoint: Checkpoint,
        specs: Mapping[str, TensorSpec],
        extent: int,
        means: Means,
    ) -> None:
        self._arena = arena
        self._checkpoint = checkpoint
        self._specs = specs
        self._extent = extent
        self._means = means
        self._mutex = threading.Lock()
        self._stack = ExitStack()
        self._error: Exception | None = None

    def open(self) -> list[Read]:
        """Map the extent and open the files that it is in. Raises CheckpointChanged, BadCheckpoint."""
        layout = self._arena.header.layout
        reads = list(plan_reads(self._specs, layout, self._extent, self._means.pace.chunk_bytes))
        place = layout.extents[self._extent]
        self._begin = place.offset
        # The memory that a read has made: from its first byte, or the extent's, to the next one's.
        cuts = [place.offset, *(read.pieces[0].target for read in reads[1:]), place.offset + place.size_bytes]
        self._ranges = dict(zip(reads, pairwise(cuts), strict=False))  # no reads: one range too many
        self._left_count = len(reads)
        with ExitStack() as stack:
            stack.enter_context(self._means.buffers.kept())
            used = dict.fromkeys(read.file for read in reads)
            files = self._checkpoint.files
            self._sources = {n: stack.enter_context(SourceFile(files[n], self._means.is_buffered)) for n in used}
            self._memory = stack.enter_context(self._arena.window(self._extent, is_backed=False))
            self._stack = stack.pop_all()
        if not reads:  # nothing but empty tensors
            self._arena.back(self._extent, self._memory, 0, place.size_bytes)
            self._finish()
        return reads

    def read(self, read: Read) -> None:
        """Bring one read's bytes to where they belong, unless another read failed; the last one publishes the extent.

        Raises FillStopped, CheckpointChanged, BadCheckpoint, HostMemoryFull.
        """
        try:
            if self._error is None:
                self._bring(read)
        except Exception as error:
            self._error = self._error or error
            raise
        finally:
            self._pass()

    def skip(self) -> None:
        """A read will not be made: the extent stays unfinished."""
        self._error = self._error or FillStopped()
        self._pass()

    def _pass(self) -> None:
        with self._mutex:
            self._left_count -= 1
            is_last = not self._left_count
        if is_last:
            self._finish()

    def _bring(self, read: Read) -> None:
        self._means.pace.take(read.size_bytes)
        start, end = self._ranges[read]
        self._arena.back(self._extent, self._memory, start - self._begin, end - self._begin)
        source = self._sources[read.file]
        with self._means.buffers.one() as staging:
            if not read.is_changed:
                source.read(read.offset, read.size_bytes, list(map(self._target, read.pieces)), staging)
                return
            raw = source.fetch(read.offset, read.size_bytes, staging)
            share_out(raw, [self._target(piece) for piece in read.pieces if not piece.change])
            for piece in read.pieces:
                if piece.change:
                    self._pack(raw, piece, *piece.change)

    def _target(self, piece: Piece) -> Target:
        return Target(piece.at, self._memory[piece.target - self._begin :][: piece.target_bytes])

    def _pack(self, raw: memoryview, piece: Piece, source: str, target: str) -> None:
        from services.loader.packing import pack  # numpy: most loaders do without

        pack(raw[piece.at :][: piece.size_bytes], source, target, self._target(piece).memory)

    def _finish(self) -> None:
        with self._stack:
            if self._error is None:
                for source in self._sources.values():
                    source.check()
                self._arena.publish(self._extent, xxhash.xxh3_128_digest(self._memory))
