"""What a library's converter makes of tensors, watched: what it only moves about is not copied.

Converters split, rename and put together, and some copy on the way (`torch.cat([q])`, `.clone()`). Nobody writes to
params here, so a copy of a run of bytes is that run, and a concatenation of runs that are unpacked on arrival is their
list. What is truly computed is computed with real numbers, on the host, and is a private copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from services.sampler.phantoms import Phantoms

_aten = torch.ops.aten


class Conversion(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is open, tensors of `data` (an arena's bytes) and phantoms may be converted. Nothing may be written."""

    def __init__(self, data: torch.Tensor, phantoms: Phantoms | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._data = data
        self._phantoms = phantoms
        self._computed: dict[int, tuple[str, torch.Tensor]] = {}  # by the address of the memory

    def reason(self, tensor: torch.Tensor) -> str:
        """Why a tensor is a private copy, if it was computed here; else empty."""
        how, _ = self._computed.get(tensor.untyped_storage().data_ptr(), ("", None))
        return how

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        if func._schema.is_mutable and self._is_ours(args[0]):
            raise ValueError("a converter wants to write to shared params")  # which would be a segmentation fault
        moved = self._moved(func, args)
        return self._compute(func, args, kwargs) if moved is None else moved

    def _moved(self, func: Any, args: tuple[Any, ...]) -> torch.Tensor | None:
        """The result of a mere copy, without one."""
        if func is _aten.clone.default and args[0].is_contiguous() and self._is_ours(args[0]):
            whole: torch.Tensor = _aten.alias(args[0])
            return whole
        if func is _aten.cat.default:
            along = args[1] if len(args) > 1 else 0
            parts = [part for part in args[0] if part.numel()]
            if parts and along in (0, -parts[0].ndim) and all(p.is_contiguous() and self._is_ours(p) for p in parts):
                return _adjacent(parts) if self._phantoms is None else _adjacent(parts, self._phantoms.joined)
        return None

    def _is_ours(self, tensor: torch.Tensor) -> bool:
        return self._is_phantom(tensor) or 0 <= tensor.data_ptr() - self._data.data_ptr() < self._data.numel()

    def _is_phantom(self, tensor: torch.Tensor) -> bool:
        return self._phantoms is not None and self._phantoms.holds(tensor)

    def _compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*tree_map_only(torch.Tensor, self._real, args), **tree_map_only(torch.Tensor, self._real, kwargs))
        how = f"computed by the library's converter ({func.overloadpacket.__name__})"
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._computed[tensor.untyped_storage().data_ptr()] = how, tensor
        return result

    def _real(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._phantoms is None or not self._phantoms.holds(tensor):
            return tensor
        return self._phantoms.real(tensor)


def _adjacent(
    parts: Sequence[torch.Tensor], otherwise: Callable[[Sequence[torch.Tensor]], torch.Tensor | None] = lambda _: None
) -> torch.Tensor | None:
    """Parts that lie one behind the other in one piece of memory, as one view of it."""
    first, at = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and part.dtype is first.dtype
        if not same or part.storage_offset() != at:
            return otherwise(parts)
        at += part.numel()
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return first.as_strided(shape, first.new_empty(shape, device="meta").stride(), first.storage_offset())
