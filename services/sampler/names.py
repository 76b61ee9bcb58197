"""Tensor names as other programs write them, made the libraries' own: renamed and viewed, never copied here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gguf
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

from services.errors import UnsupportedModel

Views = dict[str, torch.Tensor]

# What llama.cpp calls an architecture that transformers calls otherwise.
_ARCHITECTURES = {"qwen2_5_vl": "qwen2vl", "t5": "t5encoder"}
_LLAMA_PREFIXES = ("blk.", "enc.blk.", "token_embd.")


def of_diffusers(cls: Any, views: Views, wanted: Mapping[str, object], config: Mapping[str, Any]) -> Views:
    """Names of a single file (`double_blocks.`, `model.diffusion_model.`, ...), by diffusers' own converter.

    As they are if most of `wanted` is there, or if diffusers knows no other names for this class.
    """
    known = SINGLE_FILE_LOADABLE_CLASSES.get(cls.__name__)
    if known is None or 2 * len(wanted.keys() & views.keys()) > len(wanted):
        return views
    found: Views = known["checkpoint_mapping_fn"](checkpoint=dict(views), config=dict(config))
    return found


def of_transformers(cls: Any, views: Views, config: Any) -> Views:
    """llama.cpp's names (`blk.0.attn_q.weight`), by the gguf package's table. Raises UnsupportedModel.

    config: the model's transformers config. As they are if they are no such names.
    """
    if not any(name.startswith(_LLAMA_PREFIXES) for name in views):
        return views
    name = _ARCHITECTURES.get(config.model_type, config.model_type)
    architecture = next((key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name), None)
    if architecture is None:
        raise UnsupportedModel(f"llama.cpp's names for {config.model_type} are not known")
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    with torch.device("meta"):
        wanted = cls(config).state_dict()
    found: Views = {}
    for own in wanted:
        base, _, suffix = own.rpartition(".")
        theirs = f"{table.get_name(base)}.{suffix}"
        if theirs in views:
            found[own] = views[theirs]
    return found
