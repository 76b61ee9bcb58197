"""One pass over memory for the commonest packings: Triton kernels for CUDA, each the same numbers as its torch path.

Source: block_q8_0, block_q4_K and block_q6_K in ggml-common.h. Each operation is rounded to float32 as there, none
is fused with the next, and the rounding to the target's dtype comes last. Bytes are loaded one by one, since blocks
begin anywhere. Importing this file raises ImportError where there is no Triton; a kernel's first call compiles it.
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
def _q8_0(raw: tl.tensor, out: tl.tensor, count: tl.tensor, rows: tl.constexpr) -> None:
    """Of each program `rows` blocks: (rows, 32)."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    row = tl.minimum(row, count - 1)  # a program that has too few does the last one again
    number = tl.arange(0, 32)[None, :]
    block = raw + row * 34
    byte = tl.load(block + 2 + number)
    value = _half(block) * byte.to(tl.int8, bitcast=True).to(tl.float32)
    tl.store(out + row * 32 + number, value.to(out.dtype.element_ty))


@triton.jit
def _q4_k(raw: tl.tensor, out: tl.tensor, count: tl.tensor, rows: tl.constexpr) -> None:
    """(rows, 8 runs, 32)."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None, None]
    row = tl.minimum(row, count - 1)
    run = tl.arange(0, 8)[None, :, None]
    number = tl.arange(0, 32)[None, None, :]
    block = raw + row * 144
    first = tl.load(block + 4 + run % 4)
    second = tl.load(block + 8 + run % 4)
    low = tl.load(block + 12 + run % 4)
    small = tl.where(run < 4, first & 63, (low & 15) | ((first >> 6) << 4))
    minimum = tl.where(run < 4, second & 63, (low >> 4) | ((second >> 6) << 4))
    byte = tl.load(block + 16 + run // 2 * 32 + number)
    nibble = tl.where(run % 2 == 0, byte & 15, byte >> 4)
    value = _half(block) * small.to(tl.float32) * nibble.to(tl.float32) - _half(block + 2) * minimum.to(tl.float32)
    tl.store(out + row * 256 + run * 32 + number, value.to(out.dtype.element_ty))


@triton.jit
def _q6_k(raw: tl.tensor, out: tl.tensor, count: tl.tensor, rows: tl.constexpr) -> None:
    """(rows, 16 runs, 16)."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None, None]
    row = tl.minimum(row, count - 1)
    run = tl.arange(0, 16)[None, :, None]
    number = tl.arange(0, 16)[None, None, :]
    block = raw + row * 210
    byte = tl.load(block + run // 8 * 64 + run % 4 * 16 + number)
    nibble = tl.where(run // 4 % 2 == 0, byte & 15, byte >> 4)
    high = tl.load(block + 128 + run // 8 * 32 + run % 2 * 16 + number).to(tl.int32) >> (run // 2 % 4 * 2) & 3
    small = tl.load(block + 192 + run).to(tl.int8, bitcast=True)
    scale = _half(block + 208) * small.to(tl.float32)
    value = scale * ((nibble.to(tl.int32) | high << 4) - 32).to(tl.float32)
    tl.store(out + row * 256 + run * 16 + number, value.to(out.dtype.element_ty))


# By packing: the kernel, and how many blocks a program takes, which makes 2048 numbers.
KERNELS: dict[str, tuple[Any, int]] = {"Q8_0": (_q8_0, 64), "Q4_K": (_q4_k, 8), "Q6_K": (_q6_k, 8)}


def launch(packing: str, raw: torch.Tensor, out: torch.Tensor, count: int) -> None:
    """Unpack `count` blocks of one of KERNELS from `raw` to `out`, on the current stream of their device."""
    kernel, rows = KERNELS[packing]
    with torch.cuda.device(raw.device):
        kernel[triton.cdiv(count, rows),](raw, out, count, rows, enable_fp_fusion=False)
