"""Builds a diffusers pipeline whose params are views of arenas.

The libraries' own loaders put the views in place, for they know every historic tensor name; they are given no file.
What ends up outside the arena (converted, tied to nothing, or not in the checkpoint) is listed with its reason, and a
pipeline with a tensor left on meta is refused. Must run under the baton: building sets torch's default dtype.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from services.errors import BadCheckpoint, UnsupportedModel
from services.params.arena import AttachedArena
from services.params.layout import PlacedTensor
from services.sampler.classes import component_class, pipeline_class_of
from services.sampler.conversion import Conversion
from services.sampler.gates import BoundParam, arena_bytes
from services.sampler.llama_names import is_llama
from services.sampler.names import as_wanted, of_diffusers, of_transformers
from services.sampler.phantoms import DTYPE as PACKED_DTYPE
from services.sampler.phantoms import PLAIN, Phantoms, is_packed, told_apart, unlike
from services.sampler.processors import processors_of
from services.sampler.signatures import span_bytes

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DENOISERS = ("transformer", "unet")


@dataclass(frozen=True, slots=True)
class Outside:
    """A tensor that is not in the arena, and why."""

    name: str
    size_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class BoundComponent:
    """A component whose params were bound; `params` are those with bytes in the arena."""

    name: str
    module: nn.Module
    arena: AttachedArena
    params: tuple[BoundParam, ...]
    outside: tuple[Outside, ...]
    dtype: torch.dtype


def build_pipeline(config: Path, arenas: Mapping[str, AttachedArena]) -> tuple[Any, list[BoundComponent]]:
    """The pipeline of the folder `config`, its params bound to `arenas` by component name.

    Returns (diffusers pipeline, components). Raises UnsupportedModel, BadCheckpoint.
    """
    index = json.loads((config / "model_index.json").read_text())
    pipeline_class = pipeline_class_of(index)
    wanted = {name: (entry[0], entry[1]) for name, entry in index.items() if is_component(entry)}
    # As diffusers' torch_dtype: pipelines hand numbers from one component to the next, and most of them cast none.
    dtype = next((dtype_of(told_apart(arenas[name].tensors)[0]) for name in DENOISERS if name in arenas), None)
    components = [
        bind(name, wanted[name], config / name, arenas[name], dtype) for name in sorted(arenas) if name in wanted
    ]
    missing = [c for c in (*DENOISERS, "vae") if c in wanted and c not in arenas]
    if missing:
        raise BadCheckpoint(f"the folder has no params for {', '.join(missing)}")
    try:
        absent: dict[str, Any] = {name: None for name, entry in index.items() if entry == [None, None]}
        parts = absent | {c.name: c.module for c in components} | processors_of(index, config)
        pipeline = pipeline_class.from_pretrained(str(config), local_files_only=True, **parts)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadCheckpoint(f"diffusers cannot build {pipeline_class.__name__} from the folder's configs") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, components


def is_component(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and entry[0] is not None


def bind(
    name: str, entry: tuple[str, str], config: Path, arena: AttachedArena, dtype: torch.dtype | None = None
) -> BoundComponent:
    """Build one component with its params as views of the arena. Raises BadCheckpoint, UnsupportedModel.

    dtype: what it is computed with; floats of another kind become that on arrival. None: what most of its numbers are.
    """
    class_name = entry[1]
    cls = component_class(*entry)
    params, scales = told_apart(arena.tensors)
    data = arena_bytes(arena)
    dtype = dtype or dtype_of(params)
    phantoms = phantoms_of(cls, params, scales, data, dtype)
    views = views_of(params, data, phantoms)
    conversion = Conversion(data, phantoms)
    build = bind_transformers if issubclass(cls, transformers.PreTrainedModel) else bind_diffusers
    try:
        module, reasons = build(cls, config, views, dtype, conversion)
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise BadCheckpoint(f"{name}: {class_name} cannot take these params: {first_line(error)}") from error
    module.eval()
    # As the libraries leave them: torch folds a product with a param that requires grad in another way than one with a
    # param that does not (should_fold in its LinearAlgebra.cpp), and the last bits differ.
    for param in module.parameters():
        param.requires_grad_(param.is_floating_point())
    refuse_meta(name, module)

    def reason(tensor_name: str, tensor: torch.Tensor) -> str:
        why = reasons.get(tensor_name) or conversion.reason(tensor)
        if phantoms and not why:
            raise UnsupportedModel(f"{name}: {tensor_name} is packed, and the library wants to convert it")
        return why or "converted by the library"

    inside, outside = sort_tensors(module, arena, reason, phantoms)
    return BoundComponent(name, module, arena, tuple(inside), tuple(outside), dtype)


def first_line(error: BaseException) -> str:
    """What a library says, short and without a path."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return "the folder lacks a file" if "/" in line else line[:200]


def dtype_of(params: Sequence[PlacedTensor]) -> torch.dtype:
    """What a component is computed with: bf16 if it is packed or llama.cpp's, else what most of its numbers are."""
    if is_packed(params) or is_llama(param.name for param in params):
        return PACKED_DTYPE
    floats = Counter[torch.dtype]()
    for param in params:
        dtype = DTYPES.get(param.dtype)
        if dtype is not None and dtype.is_floating_point:
            floats[dtype] += math.prod(param.shape)
    return floats.most_common(1)[0][0] if floats else torch.float32


def phantoms_of(
    cls: Any, params: Sequence[PlacedTensor], scales: Mapping[str, PlacedTensor], data: torch.Tensor, dtype: torch.dtype
) -> Phantoms | None:
    """Stands for params that are not what they are computed with; None if there are none of them.

    A model that keeps some of its modules in float32 is not packed for that: what the file has of them in float32 stays
    as it is, and what it has in halves becomes float32 on arrival.
    """
    others, dtypes = unlike(params, dtype), {}
    if not is_packed(params) and dtype in (torch.float16, torch.bfloat16):
        is_kept = kept_in_float32(cls, dtype)
        others = [param for param in others if not is_kept(param.name)]
        halves = [param for param in params if PLAIN.get(param.dtype) is dtype and is_kept(param.name)]
        dtypes = {param.name: torch.float32 for param in halves}
        others += halves
    return Phantoms(others, data, scales, dtype, dtypes) if others else None


def kept_in_float32(cls: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """Whether a library keeps a tensor of this name in float32 when the model is of this dtype."""
    is_theirs = issubclass(cls, transformers.PreTrainedModel) and dtype is not torch.float16
    kept = set() if is_theirs else set(getattr(cls, "_keep_in_fp32_modules", None) or ())
    return lambda name: bool(kept.intersection(name.split(".")))


def views_of(
    tensors: Iterable[PlacedTensor], data: torch.Tensor, phantoms: Phantoms | None = None
) -> dict[str, torch.Tensor]:
    """Tensors of an arena under their checkpoint names, as they lie in its `data`; those that are packed as phantoms.

    Reads no byte of it.
    """
    views = phantoms.views() if phantoms else {}
    for tensor in tensors:
        if tensor.name in views:
            continue
        if tensor.dtype not in DTYPES:
            raise BadCheckpoint(f"{tensor.name} is {tensor.dtype}, which no pipeline here computes with")
        flat = data[tensor.offset : tensor.offset + tensor.size_bytes].view(DTYPES[tensor.dtype])
        views[tensor.name] = flat.view(tensor.shape)
    return views


Reasons = dict[str, str]


def bind_diffusers(
    cls: Any, config: Path, views: dict[str, torch.Tensor], dtype: torch.dtype, conversion: Conversion
) -> tuple[nn.Module, Reasons]:
    """A diffusers model over `views`: parameters from meta, buffers real."""
    with init_empty_weights(include_buffers=False):
        module: Any = cls.from_config(cls.load_config(str(config)))
    if hasattr(module, "_fix_state_dict_keys_on_load"):
        module._fix_state_dict_keys_on_load(views)
    with torch.no_grad(), conversion:
        wanted = module.state_dict()
        views = as_wanted(of_diffusers(cls, views, wanted, module.config), wanted)
    missing = module.load_state_dict(views, assign=True, strict=False).missing_keys
    if missing:
        raise ValueError(f"{len(missing)} tensors are not in the checkpoint, e.g. {', '.join(missing[:3])}")
    reasons = {}
    kept = set(module._keep_in_fp32_modules or ())
    for name, param in module.named_parameters():
        if kept.intersection(name.split(".")) and param.dtype in (torch.float16, torch.bfloat16):
            with conversion:
                param.data = param.data.float()
            reasons[name] = "the model keeps it in float32"
    return module, reasons


def bind_transformers(
    cls: Any, config: Path, views: dict[str, torch.Tensor], dtype: torch.dtype, conversion: Conversion
) -> tuple[nn.Module, Reasons]:
    """A transformers model over `views`, names mapped by its own loader."""
    its_config = cls.config_class.from_pretrained(str(config))
    with torch.no_grad(), conversion:
        views = of_transformers(cls, views, its_config)
    module, info = cls.from_pretrained(
        None,
        config=its_config,
        state_dict=views,
        dtype=dtype,
        output_loading_info=True,
        local_files_only=True,
    )
    if info["missing_keys"] or info.get("mismatched_keys"):
        names = sorted(map(str, [*info["missing_keys"], *info.get("mismatched_keys", [])]))
        raise ValueError(f"{len(names)} tensors are not in the checkpoint as needed, e.g. {', '.join(names[:3])}")
    for part in module.modules():
        if isinstance(part, transformers.PreTrainedModel):
            # Otherwise the first call installs them, in the middle of somebody's sweep.
            maybe_install_capturing_hooks(part)
            # A prompt is read once. Keys and values kept for a next token are memory for nothing.
            if hasattr(part.config, "use_cache"):
                part.config.use_cache = False
    return module, {}


def refuse_meta(name: str, module: nn.Module) -> None:
    """A tensor left on meta draws wrong pictures without a word."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    tensors += [(f"{n}.{k}", v) for n, m in module.named_modules() for k, v in vars(m).items() if torch.is_tensor(v)]
    left = [n for n, t in tensors if t.is_meta]
    if left:
        raise BadCheckpoint(f"{name}: {len(left)} tensors have no value, e.g. {', '.join(left[:3])}")


def sort_tensors(
    module: nn.Module,
    arena: AttachedArena,
    reason: Callable[[str, torch.Tensor], str],
    phantoms: Phantoms | None = None,
) -> tuple[list[BoundParam], list[Outside]]:
    """Tell tensors with bytes in the arena from those outside; buffers that the code itself makes are not params."""
    data = arena_bytes(arena)
    base, end = data.data_ptr(), data.data_ptr() + data.numel()
    inside: dict[int, BoundParam] = {}
    outside: dict[int, Outside] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    params = {id(p) for p in module.parameters()}
    for name, tensor in named:
        size = span_bytes(tensor)
        if base <= tensor.data_ptr() < end and size:
            view = tensor.detach()
            inside[id(tensor)] = BoundParam(tensor, tensor.data_ptr() - base, size, view)
        elif phantoms and phantoms.holds(tensor):
            packed = phantoms.origin(tensor)
            first, first_bytes = packed.ranges[0]
            inside[id(tensor)] = BoundParam(tensor, first, first_bytes, tensor.detach(), packed)
        elif id(tensor) in params:
            outside[id(tensor)] = Outside(name, size, reason(name, tensor))
    return list(inside.values()), list(outside.values())
