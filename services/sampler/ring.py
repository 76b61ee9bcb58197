"""Gates on a device with memory of its own: brought into a ring of slots ahead of the sweep, or resident.

Owns the copy stream. `residency.py` plans what stays, `registration.py` page-locks what is copied from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import structlog
import torch

from services.errors import DeviceMemoryFull
from services.params.arena import AttachedArena
from services.sampler.budget import Budget
from services.sampler.gates import Absent, Gate, arena_bytes
from services.sampler.registration import CHUNK_BYTES, Registrar, Way
from services.sampler.residency import SLOT_COUNTS, Plan, is_small, least_room, plan
from services.sampler.slots import Scratch, Slot, SlotRing, new_memory, new_slot
from services.sampler.staging import Staging

Piece = tuple[int, int, int]  # offset in the arena's data, bytes, place in the slot

log = structlog.get_logger()


class Ring:
    """Streams gates through a ring of equal slots, and keeps as many resident as the budget holds.

    On CUDA copies run on a stream of their own, ordered by events; the host never waits. With `poison` (tests, on a
    CPU) a slot is filled with NaN when its gate is left and params stay bound to it, so that a kernel that reads them
    too late draws NaN; without it params are unbound, and whoever reads one outside a gate reads NaN. What came packed
    stays packed in slots and residents, and is unpacked into one scratch when its gate opens.
    """

    def __init__(
        self,
        device: torch.device,
        budget: Budget,
        keep_residents: bool = True,
        slot_counts: Sequence[int] = SLOT_COUNTS,
        poison: bool = False,
        registrar: Registrar | None = None,
        budget_now: Callable[[], Budget] | None = None,
    ) -> None:
        self.device = device
        self.reserve_bytes = 0  # of the budget for work: activations and what riders keep between gates
        self.streamed_bytes = 0
        self._budget = budget
        self._keep_residents = keep_residents
        self._poison = poison
        self._slot_counts = slot_counts
        self._registrar = registrar
        self._budget_now = budget_now or (lambda: budget)
        self._copies = new_stream(device) if device.type == "cuda" else None
        self._staging: Staging | None = None
        self._small, self._large = SlotRing(), SlotRing()
        self._scratch = Scratch(new_memory(device, 0, poison))
        self._own_scratches: dict[Gate, Scratch] = {}  # of pinned gates, whose params are read at any time
        self._gates: list[Gate] = []
        self._pieces: dict[Gate, tuple[Piece, ...]] = {}
        self._residents: dict[Gate, Slot | None] = {}  # None: to stay once it is brought
        self._sources: dict[AttachedArena, torch.Tensor] = {}
        self._absent = Absent(device)
        self._unbound: dict[int, torch.Tensor] = {}  # by BoundParam
        self._largest_bytes = 0
        self._is_settled = True

    @property
    def way(self) -> str:
        return self._registrar.way.value if self._registrar is not None else "slots in host memory"

    @property
    def held_bytes(self) -> int:
        """Device memory that slots, residents and scratches take now."""
        residents = sum(slot.memory.numel() for slot in self._residents.values() if slot is not None)
        scratches = sum(each.memory.numel() for each in (self._scratch, *self._own_scratches.values()))
        return residents + self._small.size_bytes + self._large.size_bytes + scratches

    @property
    def work_limit_bytes(self) -> int:
        return self._work_limit(self._gates)

    def is_registered(self) -> bool:
        """Whether all that can be page-locked is."""
        return self._registrar is None or self._registrar.is_done()

    # ---- models come and go

    def bind_thread(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def attach(self, gates: Sequence[Gate], work_bytes: int = 0) -> None:
        """Take a model's gates on: size the ring, plan who stays, unbind params.

        Work that has more room than `work_bytes` gives back what the slots need. If refused, everything is as it was.
        """
        held = [*self._gates, *(g for g in gates if not g.host)]
        self._hold(held, max(work_bytes, min(self.reserve_bytes, self._work_limit(held))))
        for gate in gates:
            self._unbind(gate)
            if gate.host:
                continue
            self._pieces[gate] = tuple(pieces_of(gate))
            self._sources.setdefault(gate.arena, arena_bytes(gate.arena))
            if self._registrar is not None:
                self._registrar.add(gate.arena, self._sources[gate.arena])

    def detach(self, gates: Iterable[Gate]) -> None:
        """Let a model's gates go. No gate may be open, and no rider may need them any more."""
        gone = set(gates)
        self._hold([g for g in self._gates if g not in gone])
        for slot in (*self._small.slots, *self._large.slots):
            slot.forget(gone)
        for arena in {g.arena for g in gone} - {g.arena for g in self._gates}:
            if self._registrar is not None:
                self._registrar.remove(arena)
            self._sources.pop(arena, None)
        for gate in gone:
            self._pieces.pop(gate, None)
            self._own_scratches.pop(gate, None)
            for param in gate.params:
                self._unbound.pop(id(param), None)

    def reserve(self, work_bytes: int) -> None:
        if work_bytes != self.reserve_bytes or not self._is_settled:
            self._hold(self._gates, work_bytes)

    def review_budget(self) -> None:
        before, self._budget = self._budget, self._budget_now()
        if before != self._budget:
            try:
                self._hold(self._gates)
            except DeviceMemoryFull as error:  # whoever asks for work next hears of it
                log.warning("the process takes more than expected", reason=str(error))

    def make_way(self) -> bool:
        idle = [g for g, slot in self._residents.items() if slot is not None and not g.pinned]
        if not idle:
            return False
        log.warning("VRAM is short, residents are given up", gates=len(idle))
        self._hold(self._gates, keep_residents=False)
        return True

    def _hold(self, gates: list[Gate], reserve_bytes: int | None = None, keep_residents: bool | None = None) -> None:
        """Hold `gates` as `plan` says for what the work leaves of the budget. Raises DeviceMemoryFull first of all."""
        reserve = self.reserve_bytes if reserve_bytes is None else reserve_bytes
        keep = self._keep_residents if keep_residents is None else keep_residents
        try:
            planned = plan(gates, self._budget.ring_bytes - reserve, keep, self._slot_counts)
        except DeviceMemoryFull as error:
            raise self._budget.too_small(least_room(gates, keep, self._slot_counts), reserve) from error
        self._gates, self.reserve_bytes = gates, reserve
        self._largest_bytes = planned.large.slot_bytes
        self._is_settled = False  # memory may be short in spite of the plan
        self._settle(planned)
        self._is_settled = True

    def _work_limit(self, gates: list[Gate]) -> int:
        return self._budget.ring_bytes - least_room(gates, self._keep_residents, self._slot_counts)

    def _settle(self, planned: Plan[Gate]) -> None:
        residents = planned.residents
        sizes = (self._small.size_bytes, self._large.size_bytes, self._scratch.memory.numel())
        wanted = (planned.small.size_bytes, planned.large.size_bytes, planned.scratch_bytes)
        if residents == self._residents.keys() and sizes == wanted:
            return
        if self._copies is not None:
            torch.cuda.synchronize(self.device)
        for gate in self._residents.keys() - residents:
            self._unbind(gate)
        self._residents = {g: self._residents.get(g) for g in self._gates if g in residents}
        self._resize_scratch(planned.scratch_bytes)
        self._small.resize(planned.small, self.device, self._poison)
        self._large.resize(planned.large, self.device, self._poison)

    def _resize_scratch(self, size_bytes: int) -> None:
        if self._scratch.memory.numel() == size_bytes:
            return
        for slot in (*self._small.slots, *self._large.slots, *filter(None, self._residents.values())):
            slot.let_go(self._scratch)
        self._scratch = Scratch(new_memory(self.device, 0, self._poison))  # the old one goes before the new one comes
        self._scratch = Scratch(new_memory(self.device, size_bytes, self._poison))

    # ---- the sweep

    def enter(self, gate: Gate) -> None:
        """Make the gate's params usable by what the calling thread launches next."""
        if gate.host:
            # Only while it is looked up: a library asks a model's first param where the model is.
            for param in gate.params:
                param.tensor.data = param.view
            return
        scratch = self._scratch_of(gate)  # first: if there was no memory for it, slots may change
        slot = self._find(gate) or self._bring_or_make_way(gate)
        if slot.staging is not None:
            slot.staging.result()
            slot.staging = None
        if slot.is_arriving:
            assert slot.arrived is not None
            torch.cuda.current_stream(self.device).wait_event(slot.arrived)
            slot.is_arriving = False
        slot.unpack(gate, scratch)
        if not slot.is_bound:
            slot.is_bound = True
            for param, view in zip(gate.params, slot.views(gate, scratch), strict=True):
                param.tensor.data = view

    def leave(self, gate: Gate) -> None:
        """The gate's kernels have been launched; its slot is free once they ran."""
        if gate.host:
            self._unbind(gate)
            return
        stays = gate in self._residents
        slot = self._find(gate)
        if slot is None or (stays and (gate.pinned or not gate.is_packed)):
            return
        if slot.free is not None:
            slot.free.record(torch.cuda.current_stream(self.device))
            slot.was_left = True
        slot.is_bound = False
        if self._poison:
            if gate.is_packed:
                self._scratch.fill_with_nan()
            if not stays:
                slot.memory[: gate.size_bytes].fill_(0xFF)
                slot.gate = None
        else:
            self._unbind(gate)

    def prefetch(self, gate: Gate, upcoming: Iterator[Gate]) -> None:
        """Start copies of the nearest gates to come, as far as slots reach, never over one that is needed sooner."""
        near = {self._small: set[Gate](), self._large: set[Gate]()}
        if gate in self._pieces and gate not in self._residents:
            near[self._ring_of(gate)].add(gate)
        for following in upcoming:
            if following.host or self._is_there(following):
                continue
            if not following.is_ready():
                return
            if following in self._residents:
                self._bring_if_it_fits(following)
                continue
            ring = self._ring_of(following)
            kept = near[ring]
            if following in kept:
                continue
            if len(kept) >= len(ring.slots):
                return
            kept.add(following)
            if ring.find(following) is None:
                self._bring(following, ring.oldest(kept))

    def views(self, gate: Gate) -> tuple[torch.Tensor, ...]:
        """The open gate's params on the device."""
        slot = self._find(gate)
        assert slot is not None, f"{gate} is not open"
        return slot.views(gate, self._scratch_of(gate))

    def streamed_bytes_of(self, gate: Gate) -> int:
        return 0 if gate.host or gate in self._residents else sum(c.size_bytes for c in gate.copies)

    def resident_bytes_of(self, gate: Gate) -> int:
        return gate.size_bytes if gate in self._residents else 0

    # ---- slots

    def _ring_of(self, gate: Gate) -> SlotRing:
        return self._small if is_small(gate.size_bytes, self._largest_bytes) else self._large

    def _is_there(self, gate: Gate) -> bool:
        return self._residents.get(gate) is not None

    def _find(self, gate: Gate) -> Slot | None:
        return self._residents.get(gate) or self._ring_of(gate).find(gate)

    def _scratch_of(self, gate: Gate) -> Scratch:
        if gate.pinned:
            if gate not in self._own_scratches:
                self._own_scratches[gate] = Scratch(new_memory(self.device, gate.scratch_bytes, self._poison))
            return self._own_scratches[gate]
        if gate.scratch_bytes > self._scratch.memory.numel():  # there was no memory for it
            self._hold(self._gates, keep_residents=False)
        return self._scratch

    def _bring_or_make_way(self, gate: Gate) -> Slot:
        """Bring a gate that is to be opened. If it was to stay but memory is short, nothing but the ring stays."""
        if gate in self._residents:
            try:
                return self._bring_resident(gate)
            except torch.OutOfMemoryError:
                if gate.pinned and not self.make_way():
                    raise
                if not gate.pinned:
                    self._hold(self._gates, keep_residents=False)
                return self._bring_or_make_way(gate)
        if not self._ring_of(gate).slots:  # there was no memory for them
            self._hold(self._gates, keep_residents=False)
        return self._bring(gate, self._ring_of(gate).oldest(set()))

    def _bring_if_it_fits(self, gate: Gate) -> None:
        try:
            self._bring_resident(gate)
        except torch.OutOfMemoryError:
            if self._ring_of(gate).slots and not gate.pinned:
                # Each try makes the allocator give its cache back, and the device wait.
                del self._residents[gate]
                log.info("no room for a resident, it is streamed", gate=str(gate))

    def _bring_resident(self, gate: Gate) -> Slot:
        slot = self._bring(gate, new_slot(self.device, gate.size_bytes, self._poison))
        self._residents[gate] = slot
        return slot

    def _bring(self, gate: Gate, slot: Slot) -> Slot:
        """Copy a gate into a slot, once what last read that is done."""
        if slot.staging is not None:
            slot.staging.result()
        slot.gate, slot.is_bound, slot.staging = gate, False, None
        self._scratch.forget(slot)
        source, pieces = self._sources[gate.arena], self._pieces[gate]
        self.streamed_bytes += sum(size for _, size, _ in pieces)
        if self._copies is None or slot.arrived is None:
            for offset, size, at in pieces:
                slot.memory[at : at + size].copy_(source[offset : offset + size])
            return slot
        self._await_free(slot, self._copies)
        slot.is_arriving = True
        if self._registrar is not None and self._registrar.way is Way.STAGED:
            self._staging = self._staging or Staging(self.device, self._copies)
            slot.staging = self._staging.bring(source, pieces, slot)
            return slot
        with torch.cuda.stream(self._copies):
            for offset, size, at in pieces:
                slot.memory[at : at + size].copy_(source[offset : offset + size], non_blocking=True)
            slot.arrived.record(self._copies)
        return slot

    def _await_free(self, slot: Slot, copies: torch.cuda.Stream) -> None:
        if slot.was_left:
            assert slot.free is not None
            copies.wait_event(slot.free)
        else:
            # Fresh memory may have been another tensor's: the allocator orders it on the compute stream only.
            copies.wait_stream(torch.cuda.current_stream(self.device))

    def _unbind(self, gate: Gate) -> None:
        for param in gate.params:
            if id(param) not in self._unbound:
                self._unbound[id(param)] = self._absent.like(param.view)
            param.tensor.data = self._unbound[id(param)]


def pieces_of(gate: Gate, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Piece]:
    """The gate's copies, cut where chunks end: a CUDA copy must not cross from one registered range into the next."""
    for copy in gate.copies:
        offset, end = copy.offset, copy.offset + copy.size_bytes
        while offset < end:
            size = min(end, (offset // chunk_bytes + 1) * chunk_bytes) - offset
            yield offset, size, copy.at + offset - copy.offset
            offset += size


def new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
