"""Random blocks of every packing, and what the gguf package makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType

from services.sampler.packed import BY_NAME, unpack

Tensors = dict[str, torch.Tensor]

# Where a block has float16 scales: (first byte, how many).
SCALES = {
    "Q4_0": (0, 1), "Q4_1": (0, 2), "Q5_0": (0, 1), "Q5_1": (0, 2), "Q8_0": (0, 1), "Q2_K": (80, 2), "Q3_K": (108, 1),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208, 1), "IQ1_S": (0, 1), "IQ2_XXS": (0, 1), "IQ2_XS": (0, 1),
    "IQ2_S": (0, 1), "IQ3_XXS": (0, 1), "IQ3_S": (0, 1), "IQ4_NL": (0, 1), "IQ4_XS": (0, 1), "TQ1_0": (52, 1),
    "TQ2_0": (64, 1), "F16": (0, 1),
}  # fmt: skip


def kind_of(packing: str) -> GGMLQuantizationType:
    return GGMLQuantizationType[packing]


def reference(raw: torch.Tensor, packing: str, shape: tuple[int, ...]) -> torch.Tensor:
    """What the gguf package makes of it, float32."""
    with np.errstate(all="ignore"):
        rows = raw.numpy().reshape(*shape[:-1], -1)
        return torch.from_numpy(np.array(gguf.quants.dequantize(rows, kind_of(packing)))).reshape(shape)


def random_raw(packing: str, count: int, seed: int = 0) -> np.ndarray:
    """So many blocks of random bytes, their scales finite and of the size that weights have: (count, bytes)."""
    random = np.random.default_rng(seed)
    raw = random.integers(0, 256, (count, BY_NAME[packing].block_bytes), np.uint8)
    if packing in SCALES:
        set_scales(raw, packing, (random.normal(size=(count, 2)) * 0.01).astype(np.float16).view(np.uint16))
    elif packing == "IQ1_M":  # four bits in the upper half of each last byte; the exponent's are in the last two
        raw[:, 55] &= 0xBF
    return raw


def set_scales(raw: np.ndarray, packing: str, scales: np.ndarray) -> None:
    at, count = SCALES[packing]
    raw[:, at : at + 2 * count] = np.ascontiguousarray(scales[:, :count]).view(np.uint8)


def wide_shape(packing: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` counts blocks in its last dimension."""
    return (*shape[:-1], shape[-1] * BY_NAME[packing].block)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal, the signs of zeros too; a NaN equals any other."""
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ours[~ours.isnan()].signbit(), theirs[~theirs.isnan()].signbit())


def check(raw: np.ndarray, packing: str, shape: tuple[int, ...], **more: Any) -> None:
    tensor = torch.from_numpy(raw).reshape(-1)
    theirs = reference(tensor, packing, shape)
    assert_same(unpack(tensor, packing, shape, torch.float32, **more), theirs)
    assert_same(unpack(tensor, packing, shape, **more), theirs.to(torch.bfloat16))


def packed_as(name: str, tensor: torch.Tensor, kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type that a converter would choose: blocks for matrices whose rows hold whole ones, F32 for vectors."""
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if tensor.ndim < 2:
        return GGMLQuantizationType.F32
    return kind if tensor.shape[-1] % block == 0 else GGMLQuantizationType.F16


def write_gguf(path: Path, tensors: dict[str, torch.Tensor], kind: GGMLQuantizationType) -> dict[str, torch.Tensor]:
    """Write a file; returns what its numbers are when unpacked, in bf16."""
    writer = gguf.GGUFWriter(path, "z_image")
    unpacked = {}
    for name, tensor in tensors.items():
        chosen = packed_as(name, tensor, kind)
        raw = gguf.quants.quantize(tensor.float().numpy(), chosen)
        writer.add_tensor(name, raw, raw_dtype=chosen)
        unpacked[name] = torch.from_numpy(gguf.quants.dequantize(raw, chosen).astype(np.float32)).bfloat16()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return unpacked


def scaled_fp8(tensors: Tensors, last: str, by_row: bool = False) -> tuple[Tensors, Tensors]:
    """A file as ComfyUI has it, and the numbers in it; matrices of layers are in fp8."""
    stored: Tensors = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)} if last == "scale_weight" else {}
    numbers: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or "embed_tokens" in name or not name.endswith(".weight"):
            stored[name] = numbers[name] = tensor.bfloat16()
            continue
        largest = tensor.abs().amax(1) if by_row else tensor.abs().max()
        scale = (largest / 448).float()
        module = name.removesuffix(".weight")
        rows = scale[:, None] if by_row else scale
        stored[name] = (tensor / rows).to(torch.float8_e4m3fn)
        stored[f"{module}.{last}"] = scale
        stored[f"{module}.{'scale_input' if last == 'scale_weight' else 'input_scale'}"] = torch.tensor(0.5)
        numbers[name] = (stored[name].float() * rows).bfloat16()
    return stored, numbers
