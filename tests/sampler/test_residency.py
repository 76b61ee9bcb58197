"""Which gates stay on the device."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from services.sampler.residency import plan_residents


@dataclass(frozen=True)
class Sized:
    number: int
    size_bytes: int


@given(st.lists(st.integers(1, 1000), max_size=60), st.integers(0, 20_000))
def test_never_more_than_the_room(sizes: list[int], room: int) -> None:
    """The residents fit, and none that would still fit is left out."""
    gates = [Sized(n, size) for n, size in enumerate(sizes)]
    chosen = plan_residents(gates, room)
    spare = room - sum(g.size_bytes for g in chosen)

    assert spare >= 0
    assert all(g.size_bytes > spare for g in gates if g not in chosen)


@given(st.integers(4, 80), st.integers(1, 79))
def test_residents_are_spread_over_the_sweep(gate_count: int, wanted: int) -> None:
    """No stretch without a resident is longer than three times the mean distance."""
    wanted = min(wanted, gate_count)
    gates = [Sized(n, 10) for n in range(gate_count)]
    chosen = sorted(g.number for g in plan_residents(gates, 10 * wanted))
    around = [*chosen, chosen[0] + gate_count]  # the next sweep follows
    gaps = [b - a for a, b in itertools.pairwise(around)]

    assert len(chosen) == wanted
    assert max(gaps) <= 3 * gate_count / wanted
