"""Device memory that holds gates, one at a time, and what it takes to use a gate's params there."""

from __future__ import annotations

import functools
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from services.sampler.gates import Gate
from services.sampler.residency import SlotPlan
from services.sampler.signatures import span_bytes


@dataclass(eq=False, slots=True)
class Slot:
    """Device memory that holds one gate at a time. Its events are made once and recorded again and again."""

    memory: torch.Tensor  # uint8
    arrived: torch.cuda.Event | None = None  # its bytes are there; None on a CPU
    free: torch.cuda.Event | None = None  # kernels that read them are done
    gate: Gate | None = None
    is_bound: bool = False  # whether the gate's params are views of this memory now
    is_unpacked: bool = False  # whether what came packed was unpacked
    is_arriving: bool = False  # nobody has waited for `arrived` yet
    was_left: bool = False  # `free` was recorded
    staging: Future[None] | None = None  # copies that another thread has yet to launch
    bound: dict[Gate, tuple[torch.Tensor, ...]] = field(default_factory=dict)  # views made so far

    def views(self, gate: Gate) -> tuple[torch.Tensor, ...]:
        """The gate's params as they lie in this slot."""
        if gate not in self.bound:
            # Params outlive the request that first needed them: they must not become inference tensors.
            with torch.inference_mode(False):
                self.bound[gate] = tuple(
                    place_view(self.memory, at, p.view) for p, at in zip(gate.params, gate.places, strict=True)
                )
        return self.bound[gate]

    def unpack(self, gate: Gate) -> None:
        """Unpack what came packed, once for all who find it here."""
        if self.is_unpacked or not gate.is_packed:
            return
        for param, view in zip(gate.params, self.views(gate), strict=True):
            if param.packing:
                param.packing.unpack(functools.partial(gate.arrived, self.memory), view)
        self.is_unpacked = True

    def forget(self, gates: set[Gate]) -> None:
        """Drop gates that are no more, and with them what keeps their arenas mapped."""
        for gate in self.bound.keys() & gates:
            del self.bound[gate]
        if self.gate in gates:
            self.gate, self.is_bound = None, False


def new_slot(device: torch.device, size_bytes: int, poison: bool) -> Slot:
    """Memory for a gate. Raises torch.OutOfMemoryError."""
    with torch.inference_mode(False):  # an inference tensor could not be written again from elsewhere
        memory = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    if poison:
        memory.fill_(0xFF)  # all ones is a NaN in every float format we know
    return Slot(memory, new_event(), new_event()) if device.type == "cuda" else Slot(memory)


def new_event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def place_view(memory: torch.Tensor, at: int, like: torch.Tensor) -> torch.Tensor:
    """A tensor at byte `at` of `memory` (uint8): dtype, shape and stride of `like`."""
    flat = memory[at : at + span_bytes(like)].view(like.dtype)
    return flat.as_strided(like.shape, like.stride())


class SlotRing:
    """Equal slots, taken in turn."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self._oldest = 0

    @property
    def size_bytes(self) -> int:
        return sum(slot.memory.numel() for slot in self.slots)

    def resize(self, plan: SlotPlan, device: torch.device, poison: bool) -> None:
        """Be as planned. What slots of another size held is forgotten; the old ones go before new ones come."""
        if [slot.memory.numel() for slot in self.slots] == [plan.slot_bytes] * plan.slot_count:
            return
        self.slots, self._oldest = [], 0
        self.slots = [new_slot(device, plan.slot_bytes, poison) for _ in range(plan.slot_count)]

    def find(self, gate: Gate) -> Slot | None:
        return next((slot for slot in self.slots if slot.gate is gate), None)

    def oldest(self, keep: set[Gate]) -> Slot:
        """The slot taken longest ago that none of `keep` is in."""
        for _ in range(len(self.slots)):
            slot = self.slots[self._oldest]
            self._oldest = (self._oldest + 1) % len(self.slots)
            if slot.gate not in keep:
                return slot
        raise AssertionError("more gates are kept than there are slots")
