"""Shared modules are as before after every request, or are made so.

Modules are shared by all riders; a pipeline that swaps a processor, adds a hook, casts params or leaves a mode on would
draw other people's pictures wrong. What code computes lazily for itself (rope tables and the like) is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

# Dictionaries of a module whose entries say what it computes.
TABLES = ("_modules", "_parameters", "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
# Attributes that change the arithmetic without being in a table.
SWITCHES = ("training", "processor", "forward", "gradient_checkpointing", "_attn_implementation")


@dataclass(frozen=True, slots=True)
class Kept:
    """What one module was like."""

    name: str
    module: nn.Module
    tables: dict[str, dict[str, object]]
    switches: dict[str, object]
    dtypes: tuple[tuple[torch.Tensor, torch.dtype], ...]

    def changes(self) -> bool:
        own = self.module.__dict__
        return (
            any(not same_entries(own[table], kept) for table, kept in self.tables.items())
            or any(own.get(switch, Kept) is not value for switch, value in self.switches.items())
            or any(tensor.dtype != dtype for tensor, dtype in self.dtypes)
        )

    def restore(self) -> None:
        own = self.module.__dict__
        for table, kept in self.tables.items():
            own[table].clear()
            own[table].update(kept)
        for switch, value in self.switches.items():
            if value is Kept:
                own.pop(switch, None)
            else:
                own[switch] = value


def same_entries(now: dict[str, object], kept: dict[str, object]) -> bool:
    return len(now) == len(kept) and all(now.get(key, Kept) is value for key, value in kept.items())


class Guard:
    """Remembers modules as they are now. Use under the baton."""

    def __init__(self, roots: Iterable[tuple[str, nn.Module]]) -> None:
        self._kept = [keep(f"{root}.{name}", m) for root, module in roots for name, m in module.named_modules()]
        self._data = [(tensor, tensor.data) for kept in self._kept for tensor, _ in kept.dtypes]

    def mend(self) -> list[str]:
        """Put changed modules back; returns their names, empty if all was as before."""
        changed = [kept for kept in self._kept if kept.changes()]
        for kept in changed:
            kept.restore()
        for tensor, data in self._data if changed else ():
            if tensor.dtype != data.dtype:
                tensor.data = data
        return [kept.name for kept in changed]


def keep(name: str, module: nn.Module) -> Kept:
    own = module.__dict__
    tensors = tuple((t, t.dtype) for t in module._parameters.values() if t is not None)
    tables = {table: dict(own[table]) for table in TABLES}
    return Kept(name, module, tables, {switch: own.get(switch, Kept) for switch in SWITCHES}, tensors)
