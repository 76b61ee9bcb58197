"""Remembers prompt embeddings, so that a repeated prompt skips the text encoders' sweep."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

ENTRY_LIMIT = 64


class PromptMemo:
    """The results of `encode_prompt` by its arguments, least recently used forgotten first. Use under the baton."""

    def __init__(self, entry_limit: int = ENTRY_LIMIT) -> None:
        self._entry_limit = entry_limit
        self._results: OrderedDict[Hashable, object] = OrderedDict()

    def wrap(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """`encode`, asked only for arguments not seen before. Results are copies: pipelines may write to them."""

        @functools.wraps(encode)
        def remembered(*args: object, **options: object) -> object:
            key = freeze((args, options))
            if key is None:
                return encode(*args, **options)
            if key not in self._results:
                self._results[key] = copied(encode(*args, **options))
            if len(self._results) > self._entry_limit:
                self._results.popitem(last=False)
            else:
                self._results.move_to_end(key)
            return copied(self._results[key])

        return remembered


def freeze(value: object) -> Hashable | None:
    """A key for plain arguments; None if one of them is not plain (tensors, modules)."""
    if isinstance(value, list | tuple):
        parts = tuple(freeze(v) for v in value)
        return None if None in parts else (type(value).__name__, parts)
    if isinstance(value, dict):
        return freeze([(k, v) for k, v in sorted(value.items())])
    if value is None or isinstance(value, str | int | float | torch.device | torch.dtype):
        return (type(value).__name__, value)
    return None


def copied(value: object) -> object:
    """`value` with every tensor in it cloned."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return type(value)(copied(v) for v in value)
    return value
