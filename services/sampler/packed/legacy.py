"""Types of 32 numbers a block, each block with one float16 scale (and one float16 minimum).

Source: block_q4_0 to block_q8_0 in ggml-common.h, dequantize_row_* in ggml-quants.c. Each function takes uint8 of shape
(blocks, bytes of a block) and gives float32 of shape (blocks, 32).
"""

from __future__ import annotations

import torch

from services.sampler.packed.bits import Blocks, fields, half


def q4_0(blocks: Blocks) -> torch.Tensor:
    """scale 2, nibbles 16; a number is scale * (nibble - 8)."""
    return half(blocks[:, :2]) * fields(blocks[:, 2:], 4, 16).view(torch.int8).sub_(8)


def q4_1(blocks: Blocks) -> torch.Tensor:
    """scale 2, minimum 2, nibbles 16; a number is scale * nibble + minimum."""
    return (half(blocks[:, :2]) * fields(blocks[:, 4:], 4, 16)).add_(half(blocks[:, 2:4]))


def q5_0(blocks: Blocks) -> torch.Tensor:
    """scale 2, fifth bits 4, nibbles 16; a number is scale * (five bits - 16)."""
    return half(blocks[:, :2]) * _five_bits(blocks[:, 2:6], blocks[:, 6:]).view(torch.int8).sub_(16)


def q5_1(blocks: Blocks) -> torch.Tensor:
    """scale 2, minimum 2, fifth bits 4, nibbles 16; a number is scale * five bits + minimum."""
    return (half(blocks[:, :2]) * _five_bits(blocks[:, 4:8], blocks[:, 8:])).add_(half(blocks[:, 2:4]))


def _five_bits(high: Blocks, low: Blocks) -> torch.Tensor:
    return fields(low, 4, 16).bitwise_or_(fields(high, 1, 1).bitwise_left_shift_(4))


def q8_0(blocks: Blocks) -> torch.Tensor:
    """scale 2, int8 32."""
    return half(blocks[:, :2]) * blocks[:, 2:].view(torch.int8)
