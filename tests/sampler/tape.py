"""A CUDA graph's stand-in on a CPU: the operations of a call, run again on the very memory that they used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class Tape(TorchDispatchMode):
    """Notes each operation with its tensors as they are now: what is bound elsewhere later is read where it was."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when a stream is capturing")
        # The alias is made below this mode, which is not asked again.
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}))
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            fresh = func(*args, **kwargs)
            for was, now in zip(tree_leaves(result), tree_leaves(fresh), strict=True):
                if isinstance(was, torch.Tensor) and was.data_ptr() != now.data_ptr():
                    was.copy_(now)


class TapeRecorder:
    """Runs what it records; a CUDA graph would not, and nobody may rely on it."""

    alignment = 64
    held_bytes = 0

    def __init__(self) -> None:
        self.drops = 0

    def warm_up(self, work: Callable[[], object]) -> None:
        work()

    def record(self, work: Callable[[], object]) -> Callable[[], object]:
        tape = Tape()
        with tape:
            work()
        return tape.replay

    def failures(self) -> int:
        return 0

    def drop(self) -> None:
        self.drops += 1
        self.held_bytes = 0
