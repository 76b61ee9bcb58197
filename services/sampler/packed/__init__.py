"""Packed weights become numbers: ggml's block types and fp8, in plain torch operations, on CPU and CUDA alike.

Numbers are computed in float32, each operation rounded as the gguf package's and in the same order, so that they equal
its own bit for bit; they are rounded once more, to the dtype that is asked for. Knows no model and no arena.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch

from services.errors import UnsupportedModel
from services.params.gguf_header import PACKINGS, Packing
from services.sampler.packed import fp, i_quants, k_quants, legacy
from services.sampler.packed.bits import looked_up

# Of float32 in a slice. All that is needed to unpack one is less than three times that.
SLICE_BYTES = 16 << 20

Unpacker = Callable[[torch.Tensor], torch.Tensor]

# By the packing's name: uint8 (blocks, bytes of a block) to (blocks, numbers of a block) of any float dtype.
UNPACKERS: dict[str, Unpacker] = {
    "F32": partial(fp.plain, dtype=torch.float32), "F16": partial(fp.plain, dtype=torch.float16),
    "BF16": partial(fp.plain, dtype=torch.bfloat16),
    "Q4_0": legacy.q4_0, "Q4_1": legacy.q4_1, "Q5_0": legacy.q5_0, "Q5_1": legacy.q5_1, "Q8_0": legacy.q8_0,
    "Q2_K": k_quants.q2_k, "Q3_K": k_quants.q3_k, "Q4_K": k_quants.q4_k, "Q5_K": k_quants.q5_k, "Q6_K": k_quants.q6_k,
    "IQ1_S": i_quants.iq1_s, "IQ1_M": i_quants.iq1_m, "IQ2_XXS": i_quants.iq2_xxs, "IQ2_XS": i_quants.iq2_xs,
    "IQ2_S": i_quants.iq2_s, "IQ3_XXS": i_quants.iq3_xxs, "IQ3_S": i_quants.iq3_s, "IQ4_NL": i_quants.iq4_nl,
    "IQ4_XS": i_quants.iq4_xs,
    "TQ1_0": fp.tq1_0, "TQ2_0": fp.tq2_0, "MXFP4": fp.mxfp4, "NVFP4": fp.nvfp4,
}  # fmt: skip
BY_NAME = {packing.name: packing for packing in PACKINGS.values()}
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def unpack(
    raw: torch.Tensor,
    packing: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    slice_bytes: int = SLICE_BYTES,
) -> torch.Tensor:
    """The numbers of a tensor, `dtype` of shape `shape`, on the device of `raw`; whole rows of a tensor are one too.

    raw: uint8, contiguous, from any byte on; packing: a name in PACKINGS; out: contiguous, to be written to. Raises
    UnsupportedModel for a packing that is not known here, ValueError for tensors that do not fit each other.
    """
    check_packing(packing)
    return _unpack(raw, UNPACKERS[packing], BY_NAME[packing], shape, _target(raw, shape, dtype, out), slice_bytes)


def check_packing(name: str) -> None:
    """Raises UnsupportedModel for a packing that is not known here."""
    if name not in UNPACKERS:
        raise UnsupportedModel(f"weights packed as {name} cannot be unpacked; {', '.join(UNPACKERS)} can")


def unpack_fp8(
    raw: torch.Tensor,
    kind: str,
    shape: tuple[int, ...],
    scale: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    slice_bytes: int = SLICE_BYTES,
) -> torch.Tensor:
    """As `unpack`, for the fp8 types of safetensors, named as there.

    scale: what each is multiplied with in float32, on the CPU or the device of `raw`: one number, or one for each row.
    """
    if kind not in FP8:
        raise UnsupportedModel(f"Weights of type {kind} cannot be unpacked; {', '.join(FP8)} can.")
    rows = 1 if scale is None else scale.numel()
    if rows != 1 and rows != math.prod(shape[:1]):
        raise ValueError(f"a scale of {rows} numbers where one is expected, or one for each row of {shape}")
    target = _target(raw, shape, dtype, out)
    if scale is not None and rows != 1:
        width, scales = math.prod(shape[1:]), scale.to(raw.device).float().view(rows, 1)
        unpacker = partial(fp.fp8, kind=FP8[kind])
        return _unpack(raw, unpacker, Packing(kind, width, width), (rows, width), target, slice_bytes, scales)
    table = fp.fp8_table(FP8[kind], scale, dtype, raw.device)
    return _unpack(raw, partial(looked_up, table), Packing(kind, 1, 1), shape, target, slice_bytes)


def _target(raw: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor:
    if out is None:
        return torch.empty(shape, dtype=dtype, device=raw.device)
    if (out.shape, out.dtype, out.device) != (shape, dtype, raw.device) or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} of {tuple(out.shape)}; contiguous {dtype} of {shape} is expected")
    return out


def _unpack(
    raw: torch.Tensor,
    unpacker: Unpacker,
    packing: Packing,
    shape: tuple[int, ...],
    out: torch.Tensor,
    slice_bytes: int,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Unpack slice by slice, so that what is in float32 at a time is bounded, and small enough for caches.

    scales: float32 (blocks, 1), multiplied with what was unpacked.
    """
    count = block_count(packing, shape)
    if raw.dtype != torch.uint8 or not raw.is_contiguous() or raw.numel() != count * packing.block_bytes:
        expected = f"{count * packing.block_bytes} contiguous bytes are expected for {packing.name} of {shape}"
        raise ValueError(f"{raw.numel()} of {raw.dtype}, where {expected}")
    blocks, numbers = raw.view(count, packing.block_bytes), out.view(count, packing.block)
    kernels = _kernels() if raw.is_cuda else None
    if kernels and packing.name in kernels.KERNELS and count:
        kernels.launch(packing.name, raw, out, count)
        return out
    step = max(slice_bytes // (packing.block * 4), 1)
    for start in range(0, count, step):
        part = unpacker(blocks[start : start + step])
        numbers[start : start + step].copy_(part if scales is None else part.mul_(scales[start : start + step]))
    return out


@functools.cache
def _kernels() -> ModuleType | None:
    """The Triton kernels, where Triton is installed and finds a C compiler, for it wants one."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return None
    try:
        from services.sampler.packed import kernels
    except ImportError:
        return None
    return kernels


def block_count(packing: Packing, shape: tuple[int, ...]) -> int:
    """Blocks of a tensor; raises ValueError if its rows are not whole blocks."""
    if math.prod(shape[-1:]) % packing.block:
        raise ValueError(
            f"rows of {math.prod(shape[-1:])} are no multiple of {packing.name}'s blocks of {packing.block}"
        )
    return math.prod(shape) // packing.block
