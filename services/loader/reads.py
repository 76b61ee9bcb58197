"""Which byte ranges of which files make up an extent, and what becomes of them. Pure: no file is opened here."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from services.params.layout import Layout
from services.params.specs import TensorSpec

Change = tuple[str, str] | None
# Of any float type so many bytes are whole blocks of any type that is written here, as 32 numbers of float32 are.
_STEP_BYTES = 128


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that are contiguous in the file and in the arena: `at` in their read, `target` in the data.

    change: (type in the file, type in the arena) if they differ; the piece is whole blocks then.
    """

    at: int
    target: int
    size_bytes: int
    target_bytes: int
    change: Change = None


@dataclass(frozen=True, slots=True)
class Read:
    """One contiguous range of one file and where its pieces go."""

    file: int
    offset: int
    size_bytes: int
    pieces: tuple[Piece, ...]

    @property
    def is_changed(self) -> bool:
        """Whether some of it is not what it becomes."""
        return any(piece.change for piece in self.pieces)


def plan_reads(specs: Mapping[str, TensorSpec], layout: Layout, extent: int, chunk_bytes: int) -> Iterator[Read]:
    """The reads that fill an extent, in the order of the arena, each at most `chunk_bytes`."""
    file, start, size = -1, 0, 0
    pieces: list[Piece] = []
    for source, offset, piece in _chunks(specs, layout, extent, chunk_bytes):
        if pieces and (source != file or offset != start + size or size + piece.size_bytes > chunk_bytes):
            yield Read(file, start, size, tuple(pieces))
            pieces = []
        if not pieces:
            file, start, size = source, offset, 0
        last = pieces[-1] if pieces else None
        if last and last.change == piece.change and last.target + last.target_bytes == piece.target:
            pieces[-1] = replace(
                last,
                size_bytes=last.size_bytes + piece.size_bytes,
                target_bytes=last.target_bytes + piece.target_bytes,
            )
        else:
            pieces.append(replace(piece, at=size))
        size += piece.size_bytes
    if pieces:
        yield Read(file, start, size, tuple(pieces))


def _chunks(
    specs: Mapping[str, TensorSpec], layout: Layout, extent: int, chunk_bytes: int
) -> Iterator[tuple[int, int, Piece]]:
    """(file, offset in it, piece), tensor by tensor."""
    for tensor in layout.tensors:
        if tensor.extent == extent:
            spec = specs[tensor.name]
            change = None if spec.dtype == tensor.dtype else (spec.dtype, tensor.dtype)
            step = chunk_bytes // _STEP_BYTES * _STEP_BYTES if change else chunk_bytes
            for done in range(0, spec.size_bytes, step):
                length = min(step, spec.size_bytes - done)
                begin, end = (n * tensor.size_bytes // spec.size_bytes for n in (done, done + length))
                yield spec.file, spec.offset + done, Piece(0, tensor.offset + begin, length, end - begin, change)
