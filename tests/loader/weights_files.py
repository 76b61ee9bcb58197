"""Small GGUF files, and safetensors with the names of some known model."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as Kind
from safetensors.numpy import save_file

LORA = ("transformer_blocks.0.attn.to_q.lora_A.weight", "transformer_blocks.0.attn.to_q.lora_B.weight")
T5 = ("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight")
VAE = ("encoder.down_blocks.0.resnets.0.norm1.weight", "decoder.up_blocks.0.resnets.0.norm1.weight")
FLUX = ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight")
WHOLE_SDXL = (
    "model.diffusion_model.input_blocks.0.0.weight",
    "model.diffusion_model.output_blocks.0.0.weight",
    "model.diffusion_model.label_emb.0.0.weight",
    "first_stage_model.encoder.down.0.block.0.norm1.weight",
    "conditioner.embedders.0.weight",
)


def write_gguf(path: Path, seed: int = 1, architecture: str = "toy", kind: Kind = Kind.Q8_0, prefix: str = "") -> Path:
    """Eight packed tensors of 3,072 numbers and one of floats, as the gguf package writes them."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    for block in range(8):
        numbers = random.standard_normal((48, 64), np.float32)
        writer.add_tensor(f"{prefix}blk.{block}.weight", gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    writer.add_tensor(f"{prefix}norm.weight", random.standard_normal(5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_bytes(*paths: Path) -> dict[str, tuple[str, bytes]]:
    """(type, packed bytes) of each tensor, as the gguf package reads them."""
    read = (tensor for path in paths for tensor in gguf.GGUFReader(path).tensors)
    return {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in read}


def write_named(path: Path, names: tuple[str, ...]) -> Path:
    """Safetensors of two halves a tensor."""
    save_file({name: np.zeros(2, np.float16) for name in names}, path)
    return path
