"""What a compiled block depends on besides its code: its params' and its arguments' layout, as plain values.

A signature is a tuple, so that it can be a key; it survives JSON, so that another process can make arguments like it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

Signature = tuple[Any, ...]
# Every kernel may assume this much of an address, bytes; what torch's compiler assumes for vectorised loads.
KERNEL_ALIGNMENT = 16


def signature(value: object) -> Signature:
    """The layout of a value: tensors without their numbers, scalars with them, containers item by item.

    Values of other kinds are told apart by their type only, and cannot be made anew: see `is_portable`.
    """
    if isinstance(value, torch.Tensor):
        return (
            "tensor", str(value.dtype).removeprefix("torch."), tuple(value.shape), value.stride(), str(value.device),
            value.is_inference(),
        )  # fmt: skip
    if value is None or isinstance(value, bool | int | float | str):
        return ("value", type(value).__name__, value)  # 1, 1.0 and True are equal keys and different programs
    if isinstance(value, list | tuple):
        return (type(value).__name__, *(signature(item) for item in value))
    if isinstance(value, Mapping):
        return ("dict", *((str(key), signature(item)) for key, item in value.items()))
    return ("other", f"{type(value).__module__}.{type(value).__qualname__}")


def is_portable(layout: Signature) -> bool:
    """Whether `build` can make such a value."""
    match layout:
        case ("tensor" | "value", *_):
            return True
        case ("list" | "tuple", *items):
            return all(is_portable(item) for item in items)
        case ("dict", *items):
            return all(is_portable(item) for _, item in items)
    return False


def build(layout: Any) -> Any:
    """A value of this layout, tensors all zero; `layout` may have come through JSON."""
    kind, *rest = layout
    if kind == "tensor":
        return empty(*rest)
    if kind == "value":
        return rest[1]
    if kind == "dict":
        return {key: build(item) for key, item in rest}
    items = [build(item) for item in rest]
    return tuple(items) if kind == "tuple" else items


def empty(dtype: str, shape: list[int], stride: list[int], device: str, is_inference: bool) -> torch.Tensor:
    """Zeros of this layout. A tensor made in inference mode is of another kind to a compiled program."""
    with torch.inference_mode(is_inference):
        return torch.empty_strided(shape, stride, dtype=getattr(torch, dtype), device=device).zero_()


def aligned(value: Any) -> Any:
    """`value` with tensors at odd addresses copied to good ones, so that one program serves them all."""
    return map_tensors(lambda t: t if t.data_ptr() % KERNEL_ALIGNMENT == 0 else t.clone(), value)


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """`value` with each tensor in it changed; containers are made anew, other values stay."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(map_tensors(change, item) for item in value)
    if type(value) is dict:
        return {key: map_tensors(change, item) for key, item in value.items()}
    return value


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Each tensor in `value`, in the order of `map_tensors`."""
    if isinstance(value, torch.Tensor):
        yield value
    elif type(value) in (list, tuple):
        for item in value:
            yield from tensors_in(item)
    elif type(value) is dict:
        for item in value.values():
            yield from tensors_in(item)


def span_bytes(tensor: torch.Tensor) -> int:
    """Bytes from the first to past the last element, strides considered."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
