"""Plain floats, types of three values, and four-bit floats under eight-bit scales.

Source: block_tq1_0, block_tq2_0, block_mxfp4 and block_nvfp4 in ggml-common.h, dequantize_row_* in ggml-quants.c; OCP
Microscaling Formats 1.0 for E2M1 and E8M0. Each function takes uint8 of shape (blocks, bytes of a block) and gives
(blocks, numbers of a block), float32 or the plain type that the bytes are.
"""

from __future__ import annotations

import functools

import gguf.quants
import numpy as np
import torch

from services.sampler.packed.bits import Blocks, fields, half, looked_up, scaled, split, values, wide


def plain(blocks: Blocks, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that the bytes are, a view of them where these are aligned for it."""
    if (blocks.storage_offset() | blocks.data_ptr()) % dtype.itemsize:
        return wide(blocks, dtype)
    return blocks.view(dtype)


def fp8_table(kind: torch.dtype, scale: torch.Tensor | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What each of the 256 bytes of an fp8 type is, times the scale in float32, rounded to `dtype`."""
    numbers = torch.arange(256, dtype=torch.uint8, device=device).view(kind).float()
    return (numbers if scale is None else numbers * scale.float().reshape(())).to(dtype)


def fp8(blocks: Blocks, kind: torch.dtype) -> torch.Tensor:
    """The numbers of an fp8 type, float32 of the bytes' shape."""
    return blocks.view(kind).float()


def tq1_0(blocks: Blocks) -> torch.Tensor:
    """Five numbers a byte in 48 bytes, four a byte in 4, scale 2. The 48 are ordered as 32 and 16."""
    parts = (_trits(blocks[:, :32], 32, 5), _trits(blocks[:, 32:48], 16, 5), _trits(blocks[:, 48:52], 4, 4))
    return half(blocks[:, 52:]) * torch.cat(parts, 1)


def _trits(part: Blocks, width: int, count: int) -> torch.Tensor:
    """-1, 0 or 1, int8 of shape (blocks, bytes * count); the order is that of `fields`.

    A byte is a fraction of 256. Its next digit to the base of 3 is what times 3 overflows; the rest stays in the byte.
    """
    powers = 3 ** torch.arange(count, dtype=torch.uint8, device=part.device)
    rests = split(part, -1, 1, width) * powers[:, None]
    return (rests.to(torch.int16) * 3 >> 8).to(torch.int8).sub_(1).flatten(1)


def tq2_0(blocks: Blocks) -> torch.Tensor:
    """numbers 64 (2 bits each, less 1), scale 2."""
    return half(blocks[:, 64:]) * fields(blocks[:, :64], 2, 32).view(torch.int8).sub_(1)


def mxfp4(blocks: Blocks) -> torch.Tensor:
    """exponent 1, nibbles 16, both for 32 numbers. The values are doubled, the scale is 2^(exponent - 128)."""
    exponent = blocks[:, :1].int()
    # Of the two least, half a scale is subnormal.
    bits = torch.where(exponent < 2, 0x00200000 << exponent, exponent - 1 << 23)
    return bits.view(torch.float32) * looked_up(values("MXFP4", blocks.device), fields(blocks[:, 1:], 4, 16))


def nvfp4(blocks: Blocks) -> torch.Tensor:
    """scales 4 (unsigned E4M3, for 16 numbers), nibbles 32. The values are doubled, the scales halved."""
    scales = looked_up(_scale_table(blocks.device), blocks[:, :4])
    return scaled(scales, looked_up(values("NVFP4", blocks.device), fields(blocks[:, 4:], 4, 8)))


@functools.cache
def _scale_table(device: torch.device) -> torch.Tensor:
    """Half of each unsigned E4M3, float32, as the gguf package has it: 0x7F is 0 there, not NaN."""
    numbers = gguf.quants.NVFP4.ue4m3_to_fp32(np.arange(256, dtype=np.uint8))
    return torch.from_numpy(numbers.astype(np.float32)).to(device)
