"""Files with the headers of published models and no bytes: families' modules on meta, written as sparse files."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import gguf
import torch
import transformers
from gguf.constants import GGMLQuantizationType
from torch import nn

from services.loader.arenas import ArenaDir
from services.loader.catalog import ModelSource
from services.loader.family import BUILT_IN
from tests import original_names
from tests.tiny_models import clip_tokenizer, qwen_tokenizer, t5_tokenizer

Shapes = dict[str, torch.Tensor]  # on meta
EXTENT = 1 << 26


def index_of(family: str) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((BUILT_IN / family / "model_index.json").read_text())
    return index


def components_of(family: str) -> list[str]:
    return sorted(path.parent.name for path in (BUILT_IN / family).glob("*/config.json"))


def module_of(family: str, part: str) -> nn.Module:
    """A component of a family without memory; families that have the same one share it."""
    library, kind = index_of(family)[part]
    return _module(library, kind, (BUILT_IN / family / part / "config.json").read_text())


@functools.cache
def _module(library: str, kind: str, config: str) -> nn.Module:
    with torch.device("meta"):
        if library == "diffusers":
            return getattr(diffusers, kind).from_config(json.loads(config)).eval()  # type: ignore[no-any-return]
        cls = getattr(transformers, kind)
        return cls(cls.config_class.from_dict(json.loads(config))).eval()  # type: ignore[no-any-return]


def _z_image(tensors: Shapes) -> Shapes:
    """q, k and v in one, and the authors' names."""
    renames = {
        "all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder.", ".to_out.0.": ".out.",
        ".norm_k.": ".k_norm.", ".norm_q.": ".q_norm.",
    }  # fmt: skip
    found: Shapes = {}
    for name, tensor in tensors.items():
        if ".attention.to_k." in name or ".attention.to_v." in name:
            continue
        if ".attention.to_q." in name:
            name, tensor = name.replace("to_q", "qkv"), torch.cat([tensor] * 3)
        for new, old in renames.items():
            name = name.replace(new, old)
        found[name] = tensor
    return found


def _flux_2(tensors: Shapes) -> Shapes:
    double = {
        "attn.norm_q.weight": "img_attn.norm.query_norm.scale", "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
        "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
        "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale", "attn.to_out.0.": "img_attn.proj.",
        "attn.to_add_out.": "txt_attn.proj.", "ff.linear_in.": "img_mlp.0.", "ff.linear_out.": "img_mlp.2.",
        "ff_context.linear_in.": "txt_mlp.0.", "ff_context.linear_out.": "txt_mlp.2.",
        "attn.to_q.": "img_attn.qkv.", "attn.add_q_proj.": "txt_attn.qkv.",
    }  # fmt: skip
    single = {
        "attn.to_qkv_mlp_proj.": "linear1.", "attn.to_out.": "linear2.", "attn.norm_q.weight": "norm.query_norm.scale",
        "attn.norm_k.weight": "norm.key_norm.scale",
    }  # fmt: skip
    rest = {
        "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "norm_out.linear": "final_layer.adaLN_modulation.1", "modulation.linear": "modulation.lin",
        "modulation_img.linear": "modulation_img.lin", "modulation_txt.linear": "modulation_txt.lin",
    }  # fmt: skip
    found: Shapes = {}
    for name, tensor in tensors.items():
        if any(part in name for part in ("attn.to_k.", "attn.to_v.", "add_k_proj", "add_v_proj")):
            continue
        if "attn.to_q." in name or "add_q_proj" in name:
            tensor = torch.cat([tensor] * 3)
        is_single = name.startswith("single_transformer_blocks.")
        table = single if is_single else double if name.startswith("transformer_blocks.") else rest
        old = next(old for old in table if old in name)
        blocks = "single_blocks." if is_single else "double_blocks."
        name = name.replace("single_transformer_blocks.", blocks).replace("transformer_blocks.", blocks)
        found[name.replace(old, table[old])] = tensor
    return found


def _wan_vae(tensors: Shapes) -> Shapes:
    """Qwen-Image's VAE as Wan's authors name it: flat lists of levels, layers by number."""
    renames = {
        ".norm1.": ".residual.0.", ".conv1.": ".residual.2.", ".norm2.": ".residual.3.", ".conv2.": ".residual.6.",
        ".conv_shortcut.": ".shortcut.", "encoder.down_blocks.": "encoder.downsamples.", ".conv_in.": ".conv1.",
        ".mid_block.resnets.0.": ".middle.0.", ".mid_block.attentions.0.": ".middle.1.",
        ".mid_block.resnets.1.": ".middle.2.", ".norm_out.": ".head.0.", ".conv_out.": ".head.2.",
    }  # fmt: skip
    found: Shapes = {}
    for name, tensor in tensors.items():
        if up := re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", name):
            level, index = int(up[1]), 3 if up[2] == "upsamplers" else int(up[3])
            name = f"decoder.upsamples.{4 * level + index}.{name[up.end() :]}"
        for new, old in renames.items():
            name = name.replace(new, old)
        name = re.sub("^quant_conv", "conv1", re.sub("^post_quant_conv", "conv2", name))
        found[name] = tensor
    return found


# By class: the layout in which the authors' files circulate.
ORIGINAL: dict[str, Callable[[Shapes], Shapes]] = {
    "ZImageTransformer2DModel": _z_image,
    "FluxTransformer2DModel": original_names.flux,
    "Flux2Transformer2DModel": _flux_2,
    "SD3Transformer2DModel": original_names.sd3,
    "UNet2DConditionModel": original_names.unet,
    "AutoencoderKL": original_names.vae,
    "AutoencoderKLQwenImage": _wan_vae,
}


def original(module: nn.Module) -> Shapes:
    """A module's tensors in its authors' layout, where that is another one."""
    tensors = dict(module.state_dict())
    layout = ORIGINAL.get(type(module).__name__)
    return layout(tensors) if layout else tensors


def write_sparse(path: Path, tensors: Mapping[str, Iterable[int]] | Shapes, prefix: str = "") -> Path:
    """A safetensors file of so many halves, whose bytes are a hole."""
    at, header = 0, {}
    for name, tensor in tensors.items():
        shape = list(tensor.shape if isinstance(tensor, torch.Tensor) else tensor)
        size = 2 * int(torch.Size(shape).numel())
        header[prefix + name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return path


def write_component(path: Path, family: str, part: str) -> Path:
    return write_sparse(path, original(module_of(family, part)))


def write_files(root: Path, family: str) -> dict[str, Path]:
    """All components of a family, each in a file of its own that is named after it."""
    return {part: write_component(root / f"{part}.safetensors", family, part) for part in components_of(family)}


def write_tokenizers(root: Path) -> dict[str, Path]:
    """A folder with a small tokenizer of each kind."""
    made = {"Qwen2": qwen_tokenizer(), "CLIP": clip_tokenizer(), "T5": t5_tokenizer()}
    for kind, tokenizer in made.items():
        tokenizer.save_pretrained(root / kind)
    return {kind: root / kind for kind in made}


# By family, the prefixes of its components in one file: the authors', or those that ComfyUI writes.
COMFY = {"transformer": "model.diffusion_model.", "vae": "vae.", "text_encoder": "text_encoders.clip_l.transformer."}
PREFIXES = {
    "sd1.5": {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "cond_stage_model.transformer.",
    },
    "sdxl": {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "flux.1-dev": {**COMFY, "text_encoder_2": "text_encoders.t5xxl.transformer."},
    "sd3.5-medium": {
        **COMFY,
        "text_encoder_2": "text_encoders.clip_g.transformer.",
        "text_encoder_3": "text_encoders.t5xxl.transformer.",
    },
}


def write_whole(path: Path, family: str) -> Path:
    """All components of a family in one file, and an average that is none of them."""
    tensors = {"model_ema.decay": torch.zeros(1000, device="meta")}
    for part, prefix in PREFIXES[family].items():
        tensors |= {prefix + name: tensor for name, tensor in original(module_of(family, part)).items()}
    return write_sparse(path, tensors)


def write_llama(
    path: Path,
    width: int,
    depth: int,
    words: Callable[[gguf.GGUFWriter], None] | None = None,
    architecture: str = "qwen3",
) -> Path:
    """A GGUF file with what tells the size of a language model; `words` adds a tokenizer."""
    writer = gguf.GGUFWriter(path, architecture)
    if words:
        words(writer)
    kind = GGMLQuantizationType.F16
    shapes = {"token_embd.weight": (8, width), **{f"blk.{n}.attn_norm.weight": (width,) for n in range(depth)}}
    for name, shape in shapes.items():
        writer.add_tensor(name, torch.zeros(shape, dtype=torch.float16).numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def published(source: ModelSource, root: Path) -> Path:
    """The config folder that samplers get."""
    arenas = ArenaDir.open(root / "arenas", allow_disk=True, placement=None)
    return arenas.path / arenas.publish_config("m", source)
