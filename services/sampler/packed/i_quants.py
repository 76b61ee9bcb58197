"""Types whose numbers come in fours or eights from a codebook, with signs apart, and those with a table of 16 values.

Source: block_iq* in ggml-common.h, dequantize_row_iq* in ggml-quants.c; the codebooks are the gguf package's. Each
function takes uint8 of shape (blocks, bytes of a block) and gives float32 of shape (blocks, 256), IQ4_NL (blocks, 32).
"""

from __future__ import annotations

import functools

import gguf.quants
import torch

from services.sampler.packed.bits import Blocks, fields, grid, half, looked_up, scaled, split, values, wide

# What IQ1 adds to or takes off each number of a group; IQ1S_DELTA.
DELTA = 0.125


def iq2_xxs(blocks: Blocks) -> torch.Tensor:
    """scale 2, then for each 32 numbers: indices 4, and a word of 4 sign indices (7 bits each) and a scale (4 bits)."""
    pairs = split(blocks[:, 2:], 8, 8)
    scales, signs = _scales_and_signs(pairs[..., 4:].flatten(1))
    return scaled(_quarter(half(blocks[:, :2]), scales), _codes("IQ2_XXS", pairs[..., :4].flatten(1)).mul_(signs))


def iq2_xs(blocks: Blocks) -> torch.Tensor:
    """scale 2, words 64 (index of 9 bits, sign index of 7), scales 8 (a nibble for 16 numbers)."""
    words = wide(blocks[:, 2:66], torch.int16)
    signs = _signs((words >> 9) & 127)
    scales = fields(blocks[:, 66:], 4, 1)
    return scaled(_quarter(half(blocks[:, :2]), scales), _codes("IQ2_XS", words & 511).mul_(signs))


def iq2_s(blocks: Blocks) -> torch.Tensor:
    """scale 2, indices 32, sign bits 32, high bits of indices 8 (2 each), scales 8 (a nibble for 16 numbers)."""
    indices = blocks[:, 2:34] | fields(blocks[:, 66:74], 2, 1).int() << 8
    signs = _plus_minus(fields(blocks[:, 34:66], 1, 1))
    scales = fields(blocks[:, 74:], 4, 1)
    return scaled(_quarter(half(blocks[:, :2]), scales), _codes("IQ2_S", indices).mul_(signs))


def iq3_xxs(blocks: Blocks) -> torch.Tensor:
    """scale 2, indices 64, then for each 32 numbers a word of 4 sign indices (7 bits each) and a scale (4 bits)."""
    scales, signs = _scales_and_signs(blocks[:, 66:])
    return scaled(half(blocks[:, :2]) * (scales + 0.5) * 0.5, _codes("IQ3_XXS", blocks[:, 2:66]).mul_(signs))


def iq3_s(blocks: Blocks) -> torch.Tensor:
    """scale 2, indices 64, ninth bits of indices 8, sign bits 32, scales 4 (a nibble for 32 numbers)."""
    indices = blocks[:, 2:66] | fields(blocks[:, 66:74], 1, 1).int() << 8
    signs = _plus_minus(fields(blocks[:, 74:106], 1, 1))
    scales = half(blocks[:, :2]) * (1 + 2 * fields(blocks[:, 106:], 4, 1))
    return scaled(scales, _codes("IQ3_S", indices).mul_(signs))


def iq1_s(blocks: Blocks) -> torch.Tensor:
    """scale 2, indices 32, words 16: for each 32 numbers 4 times 3 high bits of an index, a scale (3), a sign (1)."""
    words = wide(blocks[:, 34:], torch.int16).int()
    indices = blocks[:, 2:34] | _threes(words) << 8
    scales = half(blocks[:, :2]) * (2 * (words >> 12 & 7) + 1)
    return scaled(scales, _shifted(_codes("IQ1_S", indices), words >> 15 & 1))


def iq1_m(blocks: Blocks) -> torch.Tensor:
    """indices 32, nibbles 16 (3 high bits of an index and a sign), words 8 (4 scales of 3 bits for 16 numbers).

    The float16 scale is in the words' four highest bits, lowest first.
    """
    words = wide(blocks[:, 48:], torch.int16).int()
    nibbles = fields(blocks[:, 32:48], 4, 1).int()
    high = (words >> 12 & 15) << torch.arange(0, 16, 4, dtype=torch.int32, device=blocks.device)
    scale = high.sum(1, keepdim=True, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    numbers = _codes("IQ1_S", blocks[:, :32] | (nibbles & 7) << 8)
    return scaled(scale * (2 * _threes(words) + 1), _shifted(numbers, nibbles >> 3))


def iq4_nl(blocks: Blocks) -> torch.Tensor:
    """scale 2, nibbles 16."""
    return half(blocks[:, :2]) * looked_up(values("IQ4_NL", blocks.device), fields(blocks[:, 2:], 4, 16))


def iq4_xs(blocks: Blocks) -> torch.Tensor:
    """scale 2, high bits of scales 2 (2 each), low nibbles of scales 4, nibbles 128; a scale is six bits less 32."""
    small = fields(blocks[:, 4:8], 4, 1) | fields(blocks[:, 2:4], 2, 1) << 4
    scales = half(blocks[:, :2]) * (small.view(torch.int8) - 32)
    return scaled(scales, looked_up(values("IQ4_NL", blocks.device), fields(blocks[:, 8:], 4, 16)))


def _codes(name: str, indices: torch.Tensor) -> torch.Tensor:
    """What stands in the codebook, int8 of shape (blocks, 256)."""
    return looked_up(grid(name, indices.device), indices).view(torch.int8)


def _quarter(scale: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return scale * (scales + 0.5) * 0.25


def _shifted(codes: torch.Tensor, minus: torch.Tensor) -> torch.Tensor:
    """IQ1's numbers: float32 of the codes' shape, each group's delta added, or taken off where `minus` is 1."""
    delta = DELTA - 2 * DELTA * minus
    return (split(codes, delta.shape[1], -1) + delta[..., None]).flatten(1)


def _threes(words: torch.Tensor) -> torch.Tensor:
    """The four lowest fields of 3 bits of each word, int32 of shape (blocks, words * 4)."""
    shifts = torch.arange(0, 12, 3, dtype=torch.int32, device=words.device)
    return (words[..., None] >> shifts & 7).flatten(1)


def _scales_and_signs(part: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest four bits of each word, (blocks, words), and signs, int8 of shape (blocks, words * 32)."""
    words = wide(part, torch.int32)
    shifts = torch.arange(0, 28, 7, dtype=torch.int32, device=part.device)
    return words >> 28 & 15, _signs((words[..., None] >> shifts & 127).flatten(1))


def _signs(indices: torch.Tensor) -> torch.Tensor:
    """Eight signs for each index of 7 bits, int8 of shape (blocks, indices * 8)."""
    return looked_up(_sign_table(indices.device), indices).view(torch.int8)


@functools.cache
def _sign_table(device: torch.device) -> torch.Tensor:
    """Eight signs as one int64, for each of 128 indices: its bits, and one more that makes their number even."""
    bits = torch.frombuffer(bytearray(gguf.quants.IQ2_XXS.ksigns), dtype=torch.uint8)[:, None]
    return _plus_minus(fields(bits, 1, 1)).view(torch.int64).flatten().to(device)


def _plus_minus(bits: torch.Tensor) -> torch.Tensor:
    """1 for 0 and -1 for 1, as int8."""
    return 1 - 2 * bits.view(torch.int8)
