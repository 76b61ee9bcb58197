"""How params get from the arena to where the arithmetic is. The only file with CUDA streams and events.

`ArenaViews` serves a CPU: params are views of the arena, nothing moves. `Ring` serves a device with memory of its own:
gates are copied into a ring of slots one or two ahead of the sweep, what the residency plan says stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch

from services.errors import DeviceMemoryFull
from services.params.arena import AttachedArena
from services.sampler.gates import BoundParam, Gate, absent, arena_bytes
from services.sampler.registration import Registrar
from services.sampler.residency import plan_residents


class Transfer(Protocol):
    """What the engine asks of a device. All but `bind_thread` is called by the holder of the baton only."""

    device: torch.device
    streamed_bytes: int  # copied to the device so far

    @property
    def way(self) -> str:
        """How bytes travel, for people."""
        ...

    def bind_thread(self) -> None: ...
    def attach(self, gates: Sequence[Gate]) -> None: ...
    def detach(self, gates: Iterable[Gate]) -> None: ...
    def enter(self, gate: Gate) -> None: ...
    def leave(self, gate: Gate) -> None: ...
    def prefetch(self, gate: Gate, upcoming: Iterator[Gate]) -> None: ...
    def views(self, gate: Gate) -> tuple[torch.Tensor, ...]: ...
    def streamed_bytes_of(self, gate: Gate) -> int: ...
    def resident_bytes_of(self, gate: Gate) -> int: ...


class ArenaViews:
    """A CPU computes on the arena itself: params stay bound to their views, zero copies."""

    way = "arena views"
    device = torch.device("cpu")
    streamed_bytes = 0

    def bind_thread(self) -> None:
        pass

    def attach(self, gates: Sequence[Gate]) -> None:
        pass

    def detach(self, gates: Iterable[Gate]) -> None:
        pass

    def enter(self, gate: Gate) -> None:
        pass

    def leave(self, gate: Gate) -> None:
        pass

    def prefetch(self, gate: Gate, upcoming: Iterator[Gate]) -> None:
        pass

    def views(self, gate: Gate) -> tuple[torch.Tensor, ...]:
        return tuple(p.view for p in gate.params)

    def streamed_bytes_of(self, gate: Gate) -> int:
        return 0

    def resident_bytes_of(self, gate: Gate) -> int:
        return gate.size_bytes


@dataclass(eq=False, slots=True)
class Slot:
    """Device memory that holds one gate at a time."""

    memory: torch.Tensor  # uint8
    gate: Gate | None = None
    is_bound: bool = False  # whether the gate's params are views of this memory now
    arrived: torch.cuda.Event | None = None  # its bytes are there
    free: torch.cuda.Event | None = None  # kernels that read them are done
    bound: dict[Gate, tuple[torch.Tensor, ...]] = field(default_factory=dict)  # views made so far

    def views(self, gate: Gate) -> tuple[torch.Tensor, ...]:
        """The gate's params as they lie in this slot."""
        if gate not in self.bound:
            # Params outlive the request that first needed them: they must not become inference tensors.
            with torch.inference_mode(False):
                self.bound[gate] = tuple(
                    place_view(self.memory, at, p) for p, at in zip(gate.params, gate.places, strict=True)
                )
        return self.bound[gate]

    def forget(self, gates: set[Gate]) -> None:
        """Drop gates that are no more, and with them what keeps their arenas mapped."""
        for gate in self.bound.keys() & gates:
            del self.bound[gate]
        if self.gate in gates:
            self.gate, self.is_bound = None, False


def place_view(memory: torch.Tensor, at: int, param: BoundParam) -> torch.Tensor:
    """`param` as it lies at byte `at` of `memory` (uint8): same dtype, shape and stride as in the arena."""
    flat = memory[at : at + param.size_bytes].view(param.view.dtype)
    return flat.as_strided(param.view.shape, param.view.stride())


class Ring:
    """Streams gates through a ring of equal slots, and keeps as many resident as the budget holds.

    On CUDA copies run on a stream of their own, ordered by events; the host never waits. With `poison` (tests, on a
    CPU) a slot is filled with NaN when its gate is left and params stay bound to it, so that a kernel that reads them
    too late draws NaN; without it params are unbound, and whoever reads one outside a gate reads NaN.
    """

    def __init__(
        self,
        device: torch.device,
        budget_bytes: int,
        reserve_bytes: int = 0,
        keep_residents: bool = True,
        slot_count: int = 3,
        poison: bool = False,
    ) -> None:
        self.device = device
        self.budget_bytes = budget_bytes
        self.reserve_bytes = reserve_bytes
        self.streamed_bytes = 0
        self._keep_residents = keep_residents
        self._poison = poison
        self._slot_count = slot_count
        self._slots: list[Slot] = []
        self._oldest = 0
        self._gates: list[Gate] = []
        self._residents: dict[Gate, Slot | None] = {}  # None: to stay once it is brought
        self._sources: dict[AttachedArena, torch.Tensor] = {}
        self._registrar = Registrar(device) if device.type == "cuda" else None
        self._copies = new_stream(device) if device.type == "cuda" else None
        self._absent: dict[int, torch.Tensor] = {}  # by BoundParam

    @property
    def way(self) -> str:
        return self._registrar.way if self._registrar is not None else "slots in host memory"

    # ---- models come and go

    def bind_thread(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def attach(self, gates: Sequence[Gate]) -> None:
        """Take a model's gates on: size the ring, plan who stays, unbind params. No gate may be open.

        Raises DeviceMemoryFull, with everything as it was.
        """
        self._replan([*self._gates, *(g for g in gates if not g.host)])
        for gate in gates:
            self._unbind(gate)
            if gate.host:
                continue
            self._sources.setdefault(gate.arena, arena_bytes(gate.arena))
            if self._registrar is not None:
                self._registrar.add(gate.arena, self._sources[gate.arena])

    def detach(self, gates: Iterable[Gate]) -> None:
        """Let a model's gates go. No gate may be open, and no rider may need them any more."""
        gone = set(gates)
        self._replan([g for g in self._gates if g not in gone])
        for slot in self._slots:
            slot.forget(gone)
        for arena in {g.arena for g in gone} - {g.arena for g in self._gates}:
            if self._registrar is not None:
                self._registrar.remove(arena)
            self._sources.pop(arena, None)
        for gate in gone:
            for param in gate.params:
                self._absent.pop(id(param), None)

    def _replan(self, gates: list[Gate]) -> None:
        """Hold `gates`: size the slots for the largest streamed one and choose residents within what is left."""
        pinned = [g for g in gates if g.pinned]
        streamed = [g for g in gates if not g.pinned]
        ring = self._slot_count * max((g.size_bytes for g in streamed), default=0)
        room = self.budget_bytes - self.reserve_bytes - sum(g.size_bytes for g in pinned)
        if self._keep_residents and sum(g.size_bytes for g in streamed) <= room:
            stay, ring = set(streamed), 0
        elif ring > room:
            raise DeviceMemoryFull(
                f"the VRAM budget of {self.budget_bytes >> 20} MiB is too small: {ring >> 20} MiB for "
                f"{self._slot_count} slots and {self.reserve_bytes >> 20} MiB for work are needed; raise --max-vram"
            )
        else:
            stay = plan_residents(streamed, room - ring) if self._keep_residents else set()
        if self._copies is not None:
            torch.cuda.synchronize(self.device)
        self._gates = gates
        wanted = stay | set(pinned)
        for gate in self._residents.keys() - wanted:
            self._unbind(gate)
        self._residents = {g: self._residents.get(g) for g in self._gates if g in wanted}
        size = ring // self._slot_count
        if not self._slots or self._slots[0].memory.numel() != size:
            self._slots = []  # the old ring's memory first: the budget does not hold both
            self._slots = [self._new_slot(size) for _ in range(self._slot_count)] if size else []

    def _new_slot(self, size_bytes: int) -> Slot:
        with torch.inference_mode(False):  # an inference tensor could not be written again from elsewhere
            memory = torch.empty(size_bytes, dtype=torch.uint8, device=self.device)
        if self._poison:
            memory.fill_(0xFF)  # all ones is a NaN in every float format we know
        return Slot(memory)

    # ---- the sweep

    def enter(self, gate: Gate) -> None:
        """Make the gate's params usable by what the calling thread launches next."""
        if gate.host:
            # Only while it is looked up: a library asks a model's first param where the model is.
            for param in gate.params:
                param.tensor.data = param.view
            return
        slot = self._find(gate) or self._bring(gate, keep=())
        if slot.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.arrived)
            slot.arrived = None
        if not slot.is_bound:
            slot.is_bound = True
            for param, view in zip(gate.params, slot.views(gate), strict=True):
                param.tensor.data = view

    def leave(self, gate: Gate) -> None:
        """The gate's kernels have been launched; its slot is free once they ran."""
        if gate.host:
            self._unbind(gate)
            return
        if gate in self._residents:
            return
        slot = self._find(gate)
        if slot is None:
            return
        if self._copies is not None:
            slot.free = new_event()
            slot.free.record(torch.cuda.current_stream(self.device))
        slot.is_bound = False
        if self._poison:
            slot.memory[: gate.size_bytes].fill_(0xFF)
            slot.gate = None
        else:
            self._unbind(gate)

    def prefetch(self, gate: Gate, upcoming: Iterator[Gate]) -> None:
        """Start copies of the nearest gates to come, as far as slots reach, never over one that is needed sooner."""
        near = [gate]
        for following in upcoming:
            if len(near) >= self._slot_count or not following.is_ready():
                return
            if following.host or following in near or self._is_there(following):
                continue
            near.append(following)
            if self._find(following) is None:
                self._bring(following, keep=near)

    def views(self, gate: Gate) -> tuple[torch.Tensor, ...]:
        """The open gate's params on the device."""
        slot = self._find(gate)
        assert slot is not None, f"{gate} is not open"
        return slot.views(gate)

    def streamed_bytes_of(self, gate: Gate) -> int:
        return 0 if gate.host or gate in self._residents else sum(c.size_bytes for c in gate.copies)

    def resident_bytes_of(self, gate: Gate) -> int:
        return gate.size_bytes if gate in self._residents else 0

    # ---- slots

    def _is_there(self, gate: Gate) -> bool:
        resident = self._residents.get(gate)
        return resident is not None and resident.gate is gate

    def _find(self, gate: Gate) -> Slot | None:
        resident = self._residents.get(gate)
        if resident is not None:
            return resident
        return next((slot for slot in self._slots if slot.gate is gate), None)

    def _bring(self, gate: Gate, keep: Iterable[Gate]) -> Slot:
        """Copy a gate into a slot: one of its own if it is to stay, else the oldest that none of `keep` needs."""
        if gate in self._residents:
            slot = self._residents[gate] = self._new_slot(gate.size_bytes)
        else:
            slot = self._oldest_slot(keep)
        slot.gate, slot.is_bound = gate, False
        source = self._sources[gate.arena]
        with self._on_copy_stream(slot):
            for copy in gate.copies:
                for offset, size in within_extents(gate.arena, copy.offset, copy.size_bytes):
                    at = copy.at + offset - copy.offset
                    slot.memory[at : at + size].copy_(source[offset : offset + size], non_blocking=True)
                    self.streamed_bytes += size
            if self._copies is not None:
                slot.arrived = new_event()
                slot.arrived.record(self._copies)
        return slot

    def _oldest_slot(self, keep: Iterable[Gate]) -> Slot:
        kept = set(keep)
        for _ in range(len(self._slots)):
            slot = self._slots[self._oldest]
            self._oldest = (self._oldest + 1) % len(self._slots)
            if slot.gate not in kept:
                return slot
        raise AssertionError("more gates are kept than there are slots")

    def _on_copy_stream(self, slot: Slot) -> AbstractContextManager[object]:
        if self._copies is None:
            return nullcontext()
        if slot.free is not None:
            self._copies.wait_event(slot.free)
        else:
            # Fresh memory may have been another tensor's: the allocator orders it on the compute stream only.
            self._copies.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._copies)

    def _unbind(self, gate: Gate) -> None:
        for param in gate.params:
            if id(param) not in self._absent:
                self._absent[id(param)] = absent(param.view, self.device)
            param.tensor.data = self._absent[id(param)]


def within_extents(arena: AttachedArena, offset: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut a range where extents end: one CUDA copy must not cross from one registered range into the next."""
    end = offset + size_bytes
    for extent in arena.extents:
        start, stop = max(offset, extent.offset), min(end, extent.offset + extent.size_bytes)
        if start < stop:
            yield start, stop - start


def new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def new_event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
