"""The classes of diffusers and transformers that a pipeline's folder names."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline  # here, for it imports much: not when the first request comes
from torch import nn

from services.errors import UnsupportedModel

# Below 5, hooks on shared modules kept one caller's hidden states for the next.
TRANSFORMERS_FLOOR = 5


def check_libraries() -> None:
    """Raises UnsupportedModel if transformers is too old to share modules between requests."""
    if int(transformers.__version__.split(".")[0]) < TRANSFORMERS_FLOOR:
        raise UnsupportedModel(
            f"transformers {transformers.__version__} is too old: install {TRANSFORMERS_FLOOR} or newer"
        )


def pipeline_class_of(index: Mapping[str, object]) -> Any:
    """The pipeline class that model_index.json names. Raises UnsupportedModel."""
    name = str(index.get("_class_name"))
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
        raise UnsupportedModel(f"diffusers {diffusers.__version__} has no pipeline class {name}")
    if "PAG" in name:
        # It swaps attention processors on the shared modules in mid-request, under the other riders.
        raise UnsupportedModel(f"{name} rewrites shared modules while it draws: use the pipeline without PAG")
    return found


def component_class(library: str, class_name: str) -> type[nn.Module]:
    """The class that an entry of model_index.json names; some pipelines bring classes of their own."""
    for module_name in (library, f"diffusers.pipelines.{library}"):
        if module_name.split(".")[0] not in ("diffusers", "transformers"):
            continue
        try:
            found = getattr(importlib.import_module(module_name), class_name, None)
        except ImportError:
            continue
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    raise UnsupportedModel(f"neither diffusers nor transformers has the class {class_name}")
