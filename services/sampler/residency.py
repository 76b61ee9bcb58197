"""What the device's memory holds: which gates stay, and the slots for the others. Knows sizes and order, no torch."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from services.errors import DeviceMemoryFull

# Two gates ahead hide every copy that can be hidden; with two slots one is ahead, which costs a little at most.
SLOT_COUNTS = (3, 2)
# Gates far smaller than the largest get slots of their own, or a run of them would leave the bus idle.
SMALL_SHARE = 16
SMALL_SLOT_COUNT = 8


class Sized(Hashable, Protocol):
    """A gate, as far as it matters here."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def scratch_bytes(self) -> int:
        """What it takes beside its slot while it is open; if it is pinned, for good."""
        ...

    @property
    def passes(self) -> int:
        """How often a request passes it, roughly."""
        ...

    @property
    def pinned(self) -> bool:
        """Whether it has to stay."""
        ...


G = TypeVar("G", bound=Sized)


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """Equal slots for gates of at most `slot_bytes`."""

    slot_bytes: int
    slot_count: int

    @property
    def size_bytes(self) -> int:
        return self.slot_bytes * self.slot_count


@dataclass(frozen=True, slots=True)
class Plan(Generic[G]):
    """Who stays, the slots of the others, small gates' first, and the scratch that all take turns in."""

    residents: Set[G]
    small: SlotPlan
    large: SlotPlan
    scratch_bytes: int

    @property
    def size_bytes(self) -> int:
        return resident_bytes(self.residents) + self.small.size_bytes + self.large.size_bytes + self.scratch_bytes


def plan(
    gates: Sequence[G], room_bytes: int, keep_residents: bool = True, slot_counts: Sequence[int] = SLOT_COUNTS
) -> Plan[G]:
    """Hold `gates` within the room: all of them, or slots and as many residents as fit beside these.

    gates: in the order of the sweep; slot_counts: to be tried in turn. Raises DeviceMemoryFull if the room is less than
    `least_room`.
    """
    scratch = scratch_bytes(gates)
    if keep_residents and resident_bytes(gates) + scratch <= room_bytes:
        return Plan(set(gates), SlotPlan(0, 0), SlotPlan(0, 0), scratch)
    pinned, others = told_apart(gates)
    for slot_count in slot_counts:
        small, large = plan_slots(others, slot_count)
        left = room_bytes - Plan(set(pinned), small, large, scratch).size_bytes
        if left >= 0:
            more = plan_residents(others, left) if keep_residents else set[G]()
            return Plan(more.union(pinned), small, large, scratch)
    least = least_room(gates, keep_residents, slot_counts)
    raise DeviceMemoryFull(f"{room_bytes} bytes are too few for the gates: {least} are needed")


def least_room(gates: Sequence[G], keep_residents: bool = True, slot_counts: Sequence[int] = SLOT_COUNTS) -> int:
    """Bytes of the smallest room in which `plan` holds the gates."""
    pinned, others = told_apart(gates)
    scratch = scratch_bytes(gates)
    streaming = Plan(set(pinned), *plan_slots(others, min(slot_counts)), scratch).size_bytes
    return min(streaming, resident_bytes(gates) + scratch) if keep_residents else streaming


def told_apart(gates: Iterable[G]) -> tuple[list[G], list[G]]:
    """Those that are pinned, and the others."""
    pinned: list[G] = []
    others: list[G] = []
    for gate in gates:
        (pinned if gate.pinned else others).append(gate)
    return pinned, others


def resident_bytes(gates: Iterable[Sized]) -> int:
    """What gates take that stay: as they came, and unpacked too where anybody may read them at any time."""
    return sum(gate.size_bytes + (gate.scratch_bytes if gate.pinned else 0) for gate in gates)


def scratch_bytes(gates: Iterable[Sized]) -> int:
    """Of a scratch for all, one at a time."""
    return max((gate.scratch_bytes for gate in gates if not gate.pinned), default=0)


def plan_slots(gates: Sequence[G], slot_count: int) -> tuple[SlotPlan, SlotPlan]:
    """Slots for small gates and for large ones."""
    largest = max((g.size_bytes for g in gates), default=0)
    smalls = [g.size_bytes for g in gates if is_small(g.size_bytes, largest)]
    return SlotPlan(max(smalls, default=0), SMALL_SLOT_COUNT if smalls else 0), SlotPlan(largest, slot_count)


def is_small(size_bytes: int, largest_bytes: int) -> bool:
    return size_bytes * SMALL_SHARE <= largest_bytes


def plan_residents(gates: Sequence[G], room_bytes: int) -> set[G]:
    """Gates to keep on the device, at most `room_bytes` in all: those passed most often, spread over the sweep.

    A resident gate saves its bytes once a pass, so a denoiser's go before an encoder's. Among equals, each hides the
    copies of its neighbours behind its compute, so they are taken at even distances: in the order in which multiples
    of the golden ratio fall on them (low-discrepancy: any prefix of it is spread evenly).
    Source of the sequence: Knuth, The Art of Computer Programming 3, 6.4, Fibonacci hashing.
    """
    chosen: set[G] = set()
    golden = (5**0.5 - 1) / 2
    order = sorted(range(len(gates)), key=lambda i: (-gates[i].passes, (i + 1) * golden % 1))
    for index in order:
        gate = gates[index]
        if gate.size_bytes <= room_bytes:
            chosen.add(gate)
            room_bytes -= gate.size_bytes
    return chosen
