"""Stands for params that are packed in an arena while the libraries put them in place.

A library's loaders rename, split and view tensors, and know nothing of packed blocks. They are given tensors of the
unpacked shapes in address space that has no memory: where a param lies there when they are done says which of the
arena's bytes it is. A split by rows is a run of whole blocks, so it costs nothing either.
"""

from __future__ import annotations

import bisect
import math
import mmap
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from services.params.layout import PlacedTensor
from services.sampler.gates import round_up
from services.sampler.packed import BY_NAME, check_packing

# What packed params are computed with.
DTYPE = torch.bfloat16
_ITEM_BYTES = DTYPE.itemsize


@dataclass(frozen=True, slots=True)
class Packed:
    """A run of whole blocks of one packed tensor: where in the arena's data, and how they are packed."""

    packing: str
    offset: int
    size_bytes: int


def _has_to_be_unpacked(tensor: PlacedTensor) -> bool:
    """Blocks, and floats of another kind: a matrix product wants one dtype."""
    return (_is_in_blocks(tensor) or tensor.dtype in ("F32", "F16")) and math.prod(tensor.shape) > 0


def _is_in_blocks(tensor: PlacedTensor) -> bool:
    return tensor.dtype in BY_NAME and BY_NAME[tensor.dtype].block > 1


def is_packed(tensors: Iterable[PlacedTensor]) -> bool:
    """Whether a component has numbers that no torch dtype holds."""
    return any(map(_is_in_blocks, tensors))


class Phantoms:
    """Tensors of a component that have to be unpacked, as others see them. Nothing may be read from them: all zeros.

    Raises UnsupportedModel for a packing that nothing here unpacks.
    """

    def __init__(self, tensors: Iterable[PlacedTensor]) -> None:
        self._tensors = [tensor for tensor in tensors if _has_to_be_unpacked(tensor)]
        for tensor in self._tensors:
            check_packing(tensor.dtype)
        self._starts: list[int] = []
        end = 0
        for tensor in self._tensors:
            self._starts.append(end)
            end = round_up(end + math.prod(tensor.shape) * _ITEM_BYTES)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        space = mmap.mmap(-1, max(end, mmap.PAGESIZE), flags=flags, prot=mmap.PROT_READ)
        self._space = torch.frombuffer(space, dtype=torch.uint8)

    def views(self) -> dict[str, torch.Tensor]:
        """By name in the checkpoint, of the unpacked shapes."""
        return {
            tensor.name: self._space[start : start + math.prod(tensor.shape) * _ITEM_BYTES]
            .view(DTYPE)
            .view(tensor.shape)
            for tensor, start in zip(self._tensors, self._starts, strict=True)
        }

    def holds(self, tensor: torch.Tensor) -> bool:
        at = tensor.data_ptr() - self._space.data_ptr()
        return 0 <= at < self._space.numel() and tensor.numel() > 0

    def origin(self, tensor: torch.Tensor) -> Packed:
        """The packed bytes that a tensor in here stands for. Raises ValueError if it is no run of whole blocks."""
        at = tensor.data_ptr() - self._space.data_ptr()
        number = bisect.bisect_right(self._starts, at) - 1
        whole, first = self._tensors[number], (at - self._starts[number]) // _ITEM_BYTES
        _, block, block_bytes = BY_NAME[whole.dtype]
        if not tensor.is_contiguous() or first % block or tensor.numel() % block:
            raise ValueError(f"{whole.name} is {whole.dtype} and is needed in another order than it is packed in")
        offset = whole.offset + first // block * block_bytes
        return Packed(whole.dtype, offset, tensor.numel() // block * block_bytes)
