"""Which byte ranges of which files make up an extent. Pure functions: no file is opened here."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from services.params.layout import Layout
from services.params.specs import TensorSpec


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
