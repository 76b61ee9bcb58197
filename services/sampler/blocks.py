"""Blocks: modules behind gates whose class their component repeats. Their forward may be replaced by a faster one.

A block's gate is a hook and stays outside of its forward, so the params are there when the forward runs.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import nn

from services.sampler.gates import Gate
from services.sampler.signatures import KERNEL_ALIGNMENT, Signature, signature


@dataclass(eq=False, slots=True, weakref_slot=True)
class Block:
    """A module whose forward may be replaced, and what it takes to build one like it elsewhere."""

    gate: Gate
    component: type[nn.Module]
    config: Path  # folder of the component's config
    tensors: dict[str, Signature]
    kind: str  # equal for blocks that compute alike, as far as can be told

    @property
    def module(self) -> nn.Module:
        return self.gate.module


class Speedup(Protocol):
    """Replaces the forward of blocks. Used under the baton."""

    for_encoders: bool  # whether it gains anything where a request passes once

    def take(self, blocks: Sequence[Block]) -> None:
        """Replace the forwards of a model's blocks, before their gates are hooked."""
        ...


def blocks_of(component: nn.Module, config: Path, gates: Iterable[Gate]) -> list[Block]:
    """The blocks of a component; `config` is its folder."""
    return [describe(gate, type(component), config) for gate in repeated(gates)]


def repeated(gates: Iterable[Gate]) -> list[Gate]:
    """Gates whose module's class stands behind two of them or more; a torch layer alone gains nothing."""
    able = [gate for gate in gates if not gate.pinned and not gate.host and can_be_block(gate)]
    counts = Counter(type(gate.module) for gate in able)
    return [gate for gate in able if counts[type(gate.module)] > 1]


def can_be_block(gate: Gate) -> bool:
    # A program assumes aligned params and is shared by all blocks of a kind.
    is_torch_layer = type(gate.module).__module__.startswith("torch.")
    return not is_torch_layer and all(at % KERNEL_ALIGNMENT == 0 for at in gate.places)


def describe(gate: Gate, component: type[nn.Module], config: Path) -> Block:
    """The block behind a gate. Its params may be unbound now: their layout is that of their arena views."""
    views = {id(p.tensor): p.view for p in gate.params}
    device = str(next((t.device for t in gate.module.parameters()), "cpu"))
    tensors: dict[str, Signature] = {}
    for name, tensor in (*gate.module.named_parameters(), *gate.module.named_buffers()):
        kind, dtype, shape, stride, _, is_inference = signature(views.get(id(tensor), tensor))
        tensors[name] = (kind, dtype, shape, stride, device, is_inference)
    cls = type(gate.module)
    alike = (f"{cls.__module__}.{cls.__qualname__}", *sorted(tensors.items()), *switches(gate.module))
    # A string is hashed once; the kind is looked up at every call.
    return Block(gate, component, config, tensors, hashlib.sha256(repr(alike).encode()).hexdigest())


def switches(module: nn.Module) -> list[Signature]:
    """Scalars on the module whose names its forward mentions: blocks that differ in one compute differently.

    Only a guess: who relies on it has to find out when it is wrong.
    """
    mentioned = type(module).forward.__code__.co_names
    scalars = {name: signature(value) for name, value in vars(module).items() if name in mentioned}
    return sorted((name, *layout) for name, layout in scalars.items() if layout[0] == "value")
