"""One pass over memory for the packings that circulate most: Triton kernels for CUDA, the same numbers as torch's path.

Source: block_q4_0 to block_q6_K in ggml-common.h; which bytes hold what is told in legacy.py and k_quants.py. Each
operation is rounded to float32 as there, none is fused with the next, and the rounding to the target's dtype comes
last. Bytes are loaded one by one, since blocks begin anywhere. Importing this file raises ImportError where there is no
Triton; a kernel's first call compiles it.
"""

# Triton has no types.
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _half(at: tl.tensor) -> tl.tensor:
    """The float16 at an address, as float32."""
    bits = tl.load(at).to(tl.uint16) | (tl.load(at + 1).to(tl.uint16) << 8)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _rows(count: tl.tensor, rows: tl.constexpr) -> tl.tensor:
    """Numbers of this program's blocks; one that has too few does the last one again."""
    return tl.minimum(tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows), count - 1)


# ---- 32 numbers a block: (rows, 32)


@triton.jit
def _nibbles(at: tl.tensor, number: tl.tensor) -> tl.tensor:
    """16 bytes: the low nibbles first."""
    byte = tl.load(at + number % 16).to(tl.int32)
    return tl.where(number < 16, byte & 15, byte >> 4)


@triton.jit
def _fifth_bits(at: tl.tensor, number: tl.tensor) -> tl.tensor:
    """4 bytes, the lowest bit first; as part of a number."""
    return (tl.load(at + number // 8).to(tl.int32) >> (number % 8) & 1) << 4


@triton.jit
def _q4_0(raw: tl.tensor, out: tl.tensor, count: tl.tensor, rows: tl.constexpr) -> None:
    row, number = _rows(count, rows)[:, None], tl.arange(0, 32)[None, :]
    block = raw + row * 18
    value = _half(block) * (_nibbles(block + 2, number) - 8).to(tl.float32)
    tl.store(out + row * 32 + number, value.to(out.dtype.element_ty))


@triton.jit
def _q4_1(raw: tl.tensor, out: tl.tensor, count: tl.tensor, rows: tl.constexpr) -> None:
    row, number = _rows(count, rows)[:, None], tl.arange(0, 32)[None, :]
    block = raw + row * 20
    value = _half(block) * _nibbles(block + 4, number).to(tl.float32) + _half(block + 2)
    tl.store(out + row * 32 + number, value.to(out.dtype.element_ty))


@triton.jit
def _q5_0(raw: tl.tensor, out: tl.tensor, count: tl.tensor, rows: tl.constexpr) -> None:
    row, number = _rows(count, rows)[:, None], tl.arange(0, 32)[None, :]
    block = raw + row * 22
    value = _half(block) * ((_nibbles(block + 6, number) | _fifth_bits(block + 2, number)) - 16).to(tl.float32)
    tl.store(out + row * 32 + number, value.to(out.dtype.element_ty))


@triton.jit
def _q5_1(raw: tl.tensor, out: tl.tensor, count: tl.tensor, rows: tl.constexpr) -> None:
    row, number = _rows(count, rows)[:, None], tl.arange(0, 32)[None, :]
    block = raw + row * 24
    whole = (_nibbles(block + 8, number) | _fifth_bits(block + 4, number)).to(tl.float32)
    tl.store(out + row * 32 + number, (_half(block) * whole + _half(block + 2)).to(out.dtype.element_ty))


@triton.jit
def _q8_0(raw: tl.tensor, out: tl.tensor, count: tl.tensor, rows: tl.constexpr) -> None:
    row, number = _rows(count, rows)[:, None], tl.arange(0, 32)[None, :]
    block = raw + row * 34
    value = _half(block) * tl.load(block + 2 + number).to(tl.int8, bitcast=True).to(tl.float32)
    tl.store(out + row * 32 + number, value.to(out.dtype.element_ty))


# ---- 256 numbers a block, a scale for each run of 16: (rows, 16 runs, 16)


@triton.jit
def _two_bits(at: tl.tensor, run: tl.tensor, number: tl.tensor) -> tl.tensor:
    """64 bytes: of each 32 the lowest two bits first."""
    return tl.load(at + run // 8 * 32 + run % 2 * 16 + number).to(tl.int32) >> (run // 2 % 4 * 2) & 3


@triton.jit
def _q2_k(raw: tl.tensor, out: tl.tensor, count: tl.tensor, rows: tl.constexpr) -> None:
    row, run, number = (
        _rows(count, rows)[:, None, None],
        tl.arange(0, 16)[None, :, None],
        tl.arange(0, 16)[None, None, :],
    )
    block = raw + row * 84
    small = tl.load(block + run)
    scale, minimum = _half(block + 80) * (small & 15).to(tl.float32), _half(block + 82) * (small >> 4).to(tl.float32)
    value = scale * _two_bits(block + 16, run, number).to(tl.float32) - minimum
    tl.store(out + row * 256 + run * 16 + number, value.to(out.dtype.element_ty))


@triton.jit
def _q3_k(raw: tl.tensor, out: tl.tensor, count: tl.tensor, rows: tl.constexpr) -> None:
    row, run, number = (
        _rows(count, rows)[:, None, None],
        tl.arange(0, 16)[None, :, None],
        tl.arange(0, 16)[None, None, :],
    )
    block = raw + row * 110
    third = (tl.load(block + run % 2 * 16 + number).to(tl.int32) >> (run // 2) & 1) << 2
    low = tl.load(block + 96 + run % 8).to(tl.int32) >> (run // 8 * 4) & 15
    small = low | (tl.load(block + 104 + run % 4).to(tl.int32) >> (run // 4 * 2) & 3) << 4
    scale = _half(block + 108) * (small - 32).to(tl.float32)
    value = scale * ((_two_bits(block + 32, run, number) | third) - 4).to(tl.float32)
    tl.store(out + row * 256 + run * 16 + number, value.to(out.dtype.element_ty))


@triton.jit
def _q6_k(raw: tl.tensor, out: tl.tensor, count: tl.tensor, rows: tl.constexpr) -> None:
    row, run, number = (
        _rows(count, rows)[:, None, None],
        tl.arange(0, 16)[None, :, None],
        tl.arange(0, 16)[None, None, :],
    )
    block = raw + row * 210
    byte = tl.load(block + run // 8 * 64 + run % 4 * 16 + number).to(tl.int32)
    nibble = tl.where(run // 4 % 2 == 0, byte & 15, byte >> 4)
    small = tl.load(block + 192 + run).to(tl.int8, bitcast=True)
    scale = _half(block + 208) * small.to(tl.float32)
    value = scale * ((nibble | _two_bits(block + 128, run, number) << 4) - 32).to(tl.float32)
    tl.store(out + row * 256 + run * 16 + number, value.to(out.dtype.element_ty))


# ---- 256 numbers a block, a scale and a minimum for each run of 32: (rows, 8 runs, 32)


@triton.jit
def _scale(block: tl.tensor, run: tl.tensor) -> tl.tensor:
    """Of Q4_K and Q5_K, six bits each."""
    first, low = tl.load(block + 4 + run % 4), tl.load(block + 12 + run % 4)
    small = tl.where(run < 4, first & 63, (low & 15) | ((first >> 6) << 4))
    return _half(block) * small.to(tl.float32)


@triton.jit
def _minimum(block: tl.tensor, run: tl.tensor) -> tl.tensor:
    first, low = tl.load(block + 8 + run % 4), tl.load(block + 12 + run % 4)
    small = tl.where(run < 4, first & 63, (low >> 4) | ((first >> 6) << 4))
    return _half(block + 2) * small.to(tl.float32)


@triton.jit
def _q4_k(raw: tl.tensor, out: tl.tensor, count: tl.tensor, rows: tl.constexpr) -> None:
    row, run, number = (
        _rows(count, rows)[:, None, None],
        tl.arange(0, 8)[None, :, None],
        tl.arange(0, 32)[None, None, :],
    )
    block = raw + row * 144
    byte = tl.load(block + 16 + run // 2 * 32 + number)
    nibble = tl.where(run % 2 == 0, byte & 15, byte >> 4)
    value = _scale(block, run) * nibble.to(tl.float32) - _minimum(block, run)
    tl.store(out + row * 256 + run * 32 + number, value.to(out.dtype.element_ty))


@triton.jit
def _q5_k(raw: tl.tensor, out: tl.tensor, count: tl.tensor, rows: tl.constexpr) -> None:
    row, run, number = (
        _rows(count, rows)[:, None, None],
        tl.arange(0, 8)[None, :, None],
        tl.arange(0, 32)[None, None, :],
    )
    block = raw + row * 176
    byte = tl.load(block + 48 + run // 2 * 32 + number).to(tl.int32)
    nibble = tl.where(run % 2 == 0, byte & 15, byte >> 4)
    fifth = (tl.load(block + 16 + number).to(tl.int32) >> run & 1) << 4
    value = _scale(block, run) * (nibble | fifth).to(tl.float32) - _minimum(block, run)
    tl.store(out + row * 256 + run * 32 + number, value.to(out.dtype.element_ty))


# By packing: the kernel, and how many blocks a program takes, which makes 2048 numbers.
KERNELS: dict[str, tuple[Any, int]] = {
    "Q4_0": (_q4_0, 64), "Q4_1": (_q4_1, 64), "Q5_0": (_q5_0, 64), "Q5_1": (_q5_1, 64), "Q8_0": (_q8_0, 64),
    "Q2_K": (_q2_k, 8), "Q3_K": (_q3_k, 8), "Q4_K": (_q4_k, 8), "Q5_K": (_q5_k, 8), "Q6_K": (_q6_k, 8),
}  # fmt: skip


def launch(packing: str, raw: torch.Tensor, out: torch.Tensor, count: int) -> None:
    """Unpack `count` blocks of one of KERNELS from `raw` to `out`, on the current stream of their device."""
    kernel, rows = KERNELS[packing]
    with torch.cuda.device(raw.device):
        kernel[triton.cdiv(count, rows),](raw, out, count, rows, enable_fp_fusion=False)
