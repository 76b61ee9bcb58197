"""Memory at fixed addresses that graphs read and write, and tensors with the layout of others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from services.sampler.signatures import map_tensors, span_bytes
from services.sampler.slots import place_view


class Desk:
    """Memory where all graphs read arguments and leave results: one of them works at a time, and takes nothing home.

    Programs tell tensors made in inference mode from others, so there is memory of both kinds.
    """

    def __init__(self, device: torch.device, alignment: int) -> None:
        self._device = device
        self._alignment = alignment
        self._memory: dict[bool, torch.Tensor] = {}

    @property
    def size_bytes(self) -> int:
        return sum(memory.numel() for memory in list(self._memory.values()))

    def needs(self, tensors: Iterable[torch.Tensor]) -> dict[bool, int]:
        """Bytes of each kind of memory for tensors like these."""
        needs = {True: 0, False: 0}
        for tensor in tensors:
            needs[tensor.is_inference()] += span_bytes(tensor) + self._alignment
        return needs

    def holds(self, needs: dict[bool, int]) -> bool:
        return all(size <= len(self._memory.get(kind, ())) for kind, size in needs.items())

    def grow(self, needs: dict[bool, int]) -> None:
        """Make room; what lay here is elsewhere then. Raises torch.OutOfMemoryError."""
        for kind, size in needs.items():
            if size > len(self._memory.get(kind, ())):
                with torch.inference_mode(kind):
                    self._memory[kind] = torch.empty(size, dtype=torch.uint8, device=self._device)

    def lay_out(self, value: Any) -> Any:
        """`value` with a tensor of the same layout, on the desk, for each in it: same address modulo the alignment."""
        ends = {True: 0, False: 0}

        def place(like: torch.Tensor) -> torch.Tensor:
            kind = like.is_inference()
            memory = self._memory[kind]
            at = ends[kind] + (like.data_ptr() - memory.data_ptr() - ends[kind]) % self._alignment
            ends[kind] = at + span_bytes(like)
            with torch.inference_mode(kind):
                return place_view(memory, at, like)

        return map_tensors(place, value)


def twin(like: torch.Tensor, alignment: int) -> torch.Tensor:
    """Memory of the same layout, at the same address modulo the alignment; not filled."""
    with torch.inference_mode(like.is_inference()):
        memory = torch.empty(span_bytes(like) + alignment, dtype=torch.uint8, device=like.device)
        return place_view(memory, (like.data_ptr() - memory.data_ptr()) % alignment, like)


def fill(still: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    """Copy numbers into a twin."""
    written_once(still).copy_(written_once(fresh))
    return still


def written_once(tensor: torch.Tensor) -> torch.Tensor:
    """The part of an expanded tensor that has memory of its own."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """NaN is as good as any number here."""
    bits, others = (t.contiguous().as_strided((t.numel(),), (1,)).view(torch.uint8) for t in (one, other))
    return torch.equal(bits, others)
