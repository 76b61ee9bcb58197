"""Which gates stay on the device. One pure function; it knows sizes and order, nothing of torch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol, TypeVar


class Sized(Hashable, Protocol):
    """Something with a size."""

    @property
    def size_bytes(self) -> int: ...


G = TypeVar("G", bound=Sized)


def plan_residents(gates: Sequence[G], room_bytes: int) -> set[G]:
    """Gates to keep on the device, at most `room_bytes` in all, spread over the sweep.

    gates: in the order of the sweep. Every streamed gate costs bus time, and a resident one hides the copy of its
    neighbours behind its compute, so residents are taken at even distances: the gates are dealt in the order in which
    multiples of the golden ratio fall on them (low-discrepancy: any prefix of it is spread evenly).
    Source of the sequence: Knuth, The Art of Computer Programming 3, 6.4, Fibonacci hashing.
    """
    chosen: set[G] = set()
    golden = (5**0.5 - 1) / 2
    order = sorted(range(len(gates)), key=lambda i: ((i + 1) * golden) % 1)
    for index in order:
        gate = gates[index]
        if gate.size_bytes <= room_bytes:
            chosen.add(gate)
            room_bytes -= gate.size_bytes
    return chosen
