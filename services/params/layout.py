"""Where each tensor of a component lies in its arena. Pure functions: no file, no memory, no torch.

data:   |<------------- extent 0 ------------->|<------------ extent 1 ------------>|
        | tensor a  .. | tensor b    .. | c ....| tensor larger than an extent  ......|
        ^ 512-aligned  ^                        ^ 4096-aligned
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from services.params.specs import TensorSpec

ALIGNMENT = 512
PAGE = 4096
EXTENT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor in an arena; `offset` counts from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int
    extent: int


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of whole tensors; offset and size are multiples of a page."""

    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Tensors in natural order of their names, and the extents that tile the data."""

    tensors: tuple[PlacedTensor, ...]
    extents: tuple[Extent, ...]
    data_bytes: int


def place(tensors: Iterable[TensorSpec], extent_bytes: int = EXTENT_BYTES) -> Layout:
    """Lay tensors out in natural order of their names.

    An extent takes whole tensors while they fit into `extent_bytes`; a larger tensor is an extent of its own.
    """
    placed: list[PlacedTensor] = []
    extents: list[Extent] = []
    start = end = 0  # of the extent being laid out, from the start of the data
    is_open = False
    for spec in sorted(tensors, key=lambda tensor: natural_key(tensor.name)):
        offset = round_up(end, ALIGNMENT)
        if is_open and offset + spec.size_bytes - start > extent_bytes:
            extents.append(_close(start, end))
            offset = start = extents[-1].offset + extents[-1].size_bytes
        placed.append(PlacedTensor(spec.name, spec.dtype, spec.shape, offset, spec.size_bytes, len(extents)))
        end, is_open = offset + spec.size_bytes, True
    if is_open:
        extents.append(_close(start, end))
    return Layout(tuple(placed), tuple(extents), sum(extent.size_bytes for extent in extents))


def extents_in(extents: Iterable[Extent], offset: int, size_bytes: int) -> list[int]:
    """Numbers of the extents that lie in bytes [offset, offset + size_bytes) of the data, or partly."""
    end = offset + size_bytes
    return [n for n, extent in enumerate(extents) if extent.offset < end and offset < extent.offset + extent.size_bytes]


def natural_key(name: str) -> tuple[tuple[str | int, ...], str]:
    """Sorts `blocks.2` before `blocks.10`; the name itself decides between `a.01` and `a.1`."""
    parts = re.split(r"([0-9]+)", name)
    return tuple(int(part) if index % 2 else part for index, part in enumerate(parts)), name


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _close(start: int, end: int) -> Extent:
    return Extent(start, max(PAGE, round_up(end - start, PAGE)))
