"""What tensors become on their way into an arena, as the operator has it. Pure: no file, no numbers.

A model has a `type`, and rules of its own for tensors whose names match a pattern; both as in stable-diffusion.cpp
(`--type`, `--tensor-type-rules`), whose choice of what a type leaves alone is followed too: what is small or delicate.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from services.params.gguf_header import PACKINGS
from services.params.recognise import Role
from services.params.specs import Checkpoint, TensorSpec

# What the gguf package writes exactly.
TYPES = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "f16", "bf16", "f32")
_PACKINGS = {packing.name: packing for packing in PACKINGS.values()}
_FLOATS = ("BF16", "F16", "F32")
# The components that a model's type is about.
_ROLES = (Role.DENOISER, Role.TEXT_ENCODER)
# Blocks are for matrices; these stay what they are: embeddings of steps and positions, and the layers by which a
# picture and a prompt come in and the picture leaves. stable-diffusion.cpp leaves the same ones, and tables of words
# too; these llama.cpp packs, and they are a tenth of Z-Image's encoder.
_DELICATE = re.compile(
    r"emb(ed|d|\.)|(^|\.)shared\.|relative_attention_bias"
    r"|(img|txt|time|vector|guidance)_in\.|final_layer|(^|\.)norm_out\.|^proj_out\.|^lm_head\."
)
_WORDS = re.compile(r"(^|\.)(embed_tokens|shared|token_embedding)\.weight$")


@dataclass(frozen=True, slots=True)
class TypeRules:
    """A model's `type`, empty if it has none, and (pattern, type) pairs, the first that matches wins.

    Types are words of the arena's manifest: Q8_0 for q8_0.
    """

    type: str = ""
    rules: tuple[tuple[str, str], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.type or self.rules)

    def wanted(self, component: str, tensor: TensorSpec, role: Role | None) -> str:
        """The type that a tensor should have; empty if it stays what it is."""
        for pattern, type_ in self.rules:
            if re.search(pattern, full_name(component, tensor)):
                return type_
        return self.type if role in _ROLES and _is_meant(tensor, self.type) else ""

    def idle(self, names: Iterable[str]) -> str | None:
        """A pattern that matches none of all the model's names; None if there is none such."""
        text = list(names)
        return next((p for p, _ in self.rules if not any(re.search(p, name) for name in text)), None)


@dataclass(frozen=True, slots=True)
class Transform:
    """What changes in a component: types by tensor, and of what should have and cannot, (count, bytes) by reason."""

    types: Mapping[str, str] = field(default_factory=dict)
    left: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def stored(self, tensors: Iterable[TensorSpec]) -> list[TensorSpec]:
        """The tensors as they are in the arena; offsets are still those in the files."""
        return [_as(tensor, self.types[tensor.name]) if tensor.name in self.types else tensor for tensor in tensors]


def parse_type(text: object) -> str:
    """A type's word in the manifest. Raises ValueError."""
    if not isinstance(text, str) or text not in TYPES:
        raise ValueError(f"{text!r} is no type that is written here; {', '.join(TYPES)} are")
    return text.upper()


def full_name(component: str, tensor: TensorSpec) -> str:
    """What patterns are searched for in."""
    return f"{component}.{tensor.name}"


def plan(component: str, checkpoint: Checkpoint, rules: TypeRules, role: Role | None) -> Transform:
    """What becomes of a component's tensors."""
    types: dict[str, str] = {}
    counts, sizes = Counter[str](), Counter[str]()
    for tensor in checkpoint.tensors:
        wanted = rules.wanted(component, tensor, role)
        if not wanted or wanted == tensor.dtype or not tensor.size_bytes:
            continue
        if reason := _obstacle(tensor, wanted):
            counts[reason] += 1
            sizes[reason] += tensor.size_bytes
        else:
            types[tensor.name] = wanted
    return Transform(types, {reason: (count, sizes[reason]) for reason, count in counts.items()})


def _is_meant(tensor: TensorSpec, type_: str) -> bool:
    """Whether a model's type is about a tensor: floats want one type for all, blocks are for matrices."""
    if type_ in _FLOATS:
        return tensor.dtype in _FLOATS
    is_matrix = len(tensor.shape) > 1 and math.prod(tensor.shape[:-1]) > 1 and tensor.name.endswith(".weight")
    return is_matrix and bool(_WORDS.search(tensor.name) or not _DELICATE.search(tensor.name))


def _obstacle(tensor: TensorSpec, wanted: str) -> str:
    """Why a tensor cannot have a type; empty if it can."""
    if tensor.dtype not in _FLOATS:
        return f"{tensor.dtype} already" if tensor.dtype in _PACKINGS else f"{tensor.dtype} cannot be packed"
    block = _PACKINGS[wanted].block
    return f"rows are no multiple of {block}" if math.prod(tensor.shape[-1:]) % block else ""


def _as(tensor: TensorSpec, type_: str) -> TensorSpec:
    packing = _PACKINGS[type_]
    return replace(tensor, dtype=type_, size_bytes=math.prod(tensor.shape) // packing.block * packing.block_bytes)
