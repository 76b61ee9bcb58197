"""llama.cpp's tensor names (`blk.0.attn_q.weight`), by the tables of the gguf package.

Only architectures whose numbers llama.cpp's conversion leaves as they are: it adds one to norms of Gemma's, permutes
rows of Llama's and Mistral's. What it takes apart of a vision tower is put together again.
Source: conversion of Qwen2VLModel, Qwen2VLVisionModel, Qwen3Model and T5EncoderModel in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import gguf
import torch

from services.errors import UnsupportedModel

Views = dict[str, torch.Tensor]

# By transformers' word: llama.cpp's.
_ARCHITECTURES = {
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen2_5_vl": gguf.MODEL_ARCH.QWEN2VL,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "t5": gguf.MODEL_ARCH.T5ENCODER,
}
_PREFIXES = ("blk.", "enc.blk.", "token_embd.", "v.blk.")


def is_llama(names: Iterable[str]) -> bool:
    return any(name.startswith(_PREFIXES) for name in names)


def of_llama(views: Views, wanted: Mapping[str, object], config: Any) -> Views:
    """The tensors of `wanted`, under its names; config: the model's transformers config. Raises UnsupportedModel."""
    if config.model_type not in _ARCHITECTURES:
        raise UnsupportedModel(
            f"text encoders of type {config.model_type} are not read from GGUF, only {', '.join(_ARCHITECTURES)}: name"
            " safetensors for it"
        )
    text = gguf.get_tensor_name_map(_ARCHITECTURES[config.model_type], config.get_text_config().num_hidden_layers)
    tables = [text]
    if vision := getattr(config, "vision_config", None):
        # Its projection is numbered too, by the layers of a list with activations in it.
        tables.append(gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, max(vision.depth, 3)))
    found: Views = {}
    for own in wanted:
        tensors = (_tensor(views, table, name) for name in _spellings(own) for table in tables)
        if (tensor := next((tensor for tensor in tensors if tensor is not None), None)) is not None:
            found[own] = tensor
    return found


def _spellings(own: str) -> Iterator[str]:
    """transformers' name, also without the parts that it has got since the tables were made."""
    yield own
    for prefix in ("model.language_model.", "model."):
        if own.startswith(prefix):
            yield own.removeprefix(prefix)


def _tensor(views: Views, table: gguf.TensorNameMap, name: str) -> torch.Tensor | None:
    base, _, suffix = name.rpartition(".")
    whole = views.get(f"{table.get_name(base)}.{suffix}")
    if whole is not None:
        # The kernel of a convolution over two pictures, of which each is a tensor of its own.
        second = views.get(f"{table.get_name(base)}.{suffix}.1")
        return whole if second is None else torch.stack([whole, second], 2)
    if base.endswith(".qkv"):
        names = [f"{table.get_name(base.removesuffix('qkv') + part)}.{suffix}" for part in "qkv"]
        return torch.cat([views[name] for name in names]) if all(name in views for name in names) else None
    return None
