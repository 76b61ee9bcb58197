"""Reading fields out of packed bytes: what all families of block types share.

Blocks are uint8 of shape (blocks, bytes), a slice of columns of a larger tensor, so nothing about their alignment is
taken for granted. Only operations that CPU and CUDA both have, none of which waits for the device.
"""

from __future__ import annotations

import functools

import gguf.quants
import numpy as np
import torch

Blocks = torch.Tensor  # uint8, (blocks, bytes)


def split(part: torch.Tensor, *sizes: int) -> torch.Tensor:
    """A view of (blocks, n) as (blocks, *sizes)."""
    return part.view(part.shape[0], *sizes)


def wide(part: Blocks, dtype: torch.dtype) -> torch.Tensor:
    """Little-endian numbers that lie in the bytes, (blocks, bytes / itemsize) of `dtype`."""
    # A copy of its own is aligned; a view may begin at any byte.
    return part.clone(memory_format=torch.contiguous_format).view(dtype)


def half(part: Blocks) -> torch.Tensor:
    """The float16 scales in the bytes, as float32 of shape (blocks, bytes / 2)."""
    return wide(part, torch.float16).float()


def fields(part: Blocks, bits: int, width: int) -> torch.Tensor:
    """Every field of so many bits, uint8 of shape (blocks, bytes * 8 / bits).

    The order is ggml's: of each `width` bytes the lowest fields, one a byte, then the next higher ones, and so on.
    With a width of 1 that is the order of the bits.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=part.device)
    shifted = split(part, -1, 1, width) >> shifts[:, None]
    return shifted.bitwise_and_((1 << bits) - 1).flatten(1)


def scaled(scales: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Each run of numbers times its scale: float32 (blocks, runs) and (blocks, runs * n) give float32 of the latter."""
    return (scales[..., None] * split(numbers, scales.shape[1], -1)).flatten(1)


def looked_up(table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The table's entries, of the indices' shape."""
    return table.index_select(0, indices.flatten().int()).view(indices.shape)


@functools.cache
def grid(name: str, device: torch.device) -> torch.Tensor:
    """The codebook of an IQ type, as the gguf package has it from ggml-common.h.

    An entry's four or eight int8 are one int32 or int64 here, which is looked up at once.
    """
    kind = getattr(gguf.quants, name)
    kind.init_grid()
    codes = torch.from_numpy(kind.grid.reshape(kind.grid_shape).astype(np.int8))
    return codes.view(torch.int32 if codes.shape[1] == 4 else torch.int64).flatten().to(device)


@functools.cache
def values(name: str, device: torch.device) -> torch.Tensor:
    """The 16 values that a type's nibbles stand for, int8."""
    return torch.tensor(getattr(gguf.quants, name).kvalues, dtype=torch.int8).to(device)
