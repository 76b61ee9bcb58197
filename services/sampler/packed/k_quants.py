"""Types of 256 numbers a block, whose runs of 16 or 32 have small integer scales under one float16 scale.

Source: block_q2_K to block_q6_K in ggml-common.h, dequantize_row_* in ggml-quants.c. Each function takes uint8 of shape
(blocks, bytes of a block) and gives float32 of shape (blocks, 256). A product is exact in float32: 11 bits of a
float16 and at most 12 of the integers. Only taking off a minimum rounds, so nothing depends on the order or on fused
operations.
"""

from __future__ import annotations

import torch

from services.sampler.packed.bits import Blocks, fields, half, scaled, split


def q2_k(blocks: Blocks) -> torch.Tensor:
    """scales and minima 16 (a nibble each for 16 numbers), numbers 64 (2 bits each), scale 2, minimum 2."""
    numbers = fields(blocks[:, 16:80], 2, 32)
    scales = half(blocks[:, 80:82]) * (blocks[:, :16] & 15)
    minima = half(blocks[:, 82:84]) * (blocks[:, :16] >> 4)
    return _above(scales, numbers, minima)


def q3_k(blocks: Blocks) -> torch.Tensor:
    """third bits 32, numbers 64 (2 bits each), scales 12 (6 bits each for 16 numbers, less 32), scale 2.

    A third bit that is not set takes 4 off. Of a scale the low nibble is in the first 8 bytes, the rest in the last 4.
    """
    low = fields(blocks[:, 32:96], 2, 32).bitwise_or_(fields(blocks[:, :32], 1, 32).bitwise_left_shift_(2))
    small = fields(blocks[:, 96:104], 4, 8) | fields(blocks[:, 104:108], 2, 4) << 4
    scales = half(blocks[:, 108:110]) * (small.view(torch.int8) - 32)
    return scaled(scales, low.view(torch.int8).sub_(4))


def q4_k(blocks: Blocks) -> torch.Tensor:
    """scale 2, minimum 2, scales and minima 12 (6 bits each for 32 numbers), nibbles 128."""
    return _above(*_parts(blocks, fields(blocks[:, 16:], 4, 32)))


def q5_k(blocks: Blocks) -> torch.Tensor:
    """scale 2, minimum 2, scales and minima 12 (6 bits each for 32 numbers), fifth bits 32, nibbles 128."""
    high = fields(blocks[:, 16:48], 1, 32).bitwise_left_shift_(4)
    return _above(*_parts(blocks, fields(blocks[:, 48:], 4, 32).bitwise_or_(high)))


def q6_k(blocks: Blocks) -> torch.Tensor:
    """nibbles 128, high bits 64 (2 each), scales 16 (int8, for 16 numbers), scale 2; six bits stand for -32 to 31."""
    high = fields(blocks[:, 128:192], 2, 32).bitwise_left_shift_(4)
    numbers = fields(blocks[:, :128], 4, 64).bitwise_or_(high).view(torch.int8).sub_(32)
    return scaled(half(blocks[:, 208:]) * blocks[:, 192:208].view(torch.int8), numbers)


def _parts(blocks: Blocks, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scales, numbers, minima) of a block that begins as Q4_K's and Q5_K's do.

    Of the 12 bytes, the first four hold six bits of scales 0 to 3, the next four those of minima 0 to 3. The others
    have their low nibbles in the last four, scale below minimum, and their two high bits on top of the first eight.
    """
    first, second, low = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([first & 63, (low & 15) | (first >> 6) << 4], 1)
    minima = torch.cat([second & 63, (low >> 4) | (second >> 6) << 4], 1)
    return half(blocks[:, :2]) * scales, numbers, half(blocks[:, 2:4]) * minima


def _above(scales: torch.Tensor, numbers: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """Each run of numbers times its scale, less its minimum."""
    products = scaled(scales, numbers)
    split(products, minima.shape[1], -1).sub_(minima[..., None])
    return products
