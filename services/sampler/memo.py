"""Remembers prompt embeddings, so that a repeated prompt skips the text encoders' sweep."""

from __future__ import annotations

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from PIL import Image

Wait = Callable[[Callable[[Callable[[], None]], None]], None]

LIMIT_BYTES = 64 << 20  # of device memory; a prompt takes 0.3 to 4 MB


class PromptMemo:
    """The results of `encode_prompt` by its arguments, least recently used forgotten first. Use under the baton.

    It belongs to one attached model and so to one generation of its params; all else that the encoders see (prompts,
    images, lengths, dtypes, switches) comes as an argument.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self.size_bytes = 0
        self._limit_bytes = limit_bytes
        self._results: OrderedDict[Hashable, object] = OrderedDict()
        self._waiting: dict[Hashable, list[Callable[[], None]]] = {}  # for who encodes the same now

    def wrap(self, encode: Callable[..., Any], wait: Wait, whose: str = "") -> Callable[..., Any]:
        """`encode`, asked only for arguments not seen before. Results are copies: pipelines may write to them.

        whose: what else tells one `encode` from another.

        While another rider encodes the same, `wait` is called: it returns when what it hands over was called.
        """

        @functools.wraps(encode)
        def remembered(*args: object, **options: object) -> object:
            key = freeze((whose, args, options))
            if key is None:
                return encode(*args, **options)
            while key not in self._results and key in self._waiting:
                wait(self._waiting[key].append)
            if key not in self._results:
                return self._encode(key, lambda: encode(*args, **options))
            self._results.move_to_end(key)
            return copied(self._results[key])

        return remembered

    def _encode(self, key: Hashable, encode: Callable[[], object]) -> object:
        self._waiting[key] = []
        try:
            result = encode()
            self._keep(key, copied(result))
            return result
        finally:
            for done in self._waiting.pop(key):
                done()

    def _keep(self, key: Hashable, result: object) -> None:
        self.size_bytes += size_of(result)
        self._results[key] = result
        while self.size_bytes > self._limit_bytes:
            _, forgotten = self._results.popitem(last=False)
            self.size_bytes -= size_of(forgotten)


def size_of(value: object) -> int:
    """Bytes of every tensor in `value`."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(size_of(v) for v in value) if isinstance(value, list | tuple) else 0


def freeze(value: object) -> Hashable | None:
    """A key for plain arguments; None if one of them is not plain (tensors, modules)."""
    if isinstance(value, list | tuple):
        parts = tuple(freeze(v) for v in value)
        return None if None in parts else (type(value).__name__, parts)
    if isinstance(value, dict):
        return freeze([(k, v) for k, v in sorted(value.items())])
    if value is None or isinstance(value, str | int | float | torch.device | torch.dtype):
        return (type(value).__name__, value)
    if isinstance(value, Image.Image):
        return ("image", value.mode, value.size, hashlib.sha256(value.tobytes()).digest())
    return None


def copied(value: object) -> object:
    """`value` with every tensor in it cloned."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return type(value)(copied(v) for v in value)
    return value
