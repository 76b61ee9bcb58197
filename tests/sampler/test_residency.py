"""Which gates stay on the device."""

from __future__ import annotations

import itertools
from contextlib import suppress
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.errors import DeviceMemoryFull
from services.sampler.residency import least_room, plan, plan_residents


@dataclass(frozen=True)
class Sized:
    number: int
    size_bytes: int
    passes: int = 1
    pinned: bool = False
    scratch_bytes: int = 0


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


@given(
    st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 9), st.integers(0, 2000)), max_size=60),
    st.integers(0, 20_000),
    st.booleans(),
)
def test_a_plan_fits_or_says_what_is_missing(sizes: list[tuple[int, int, int]], room: int, keep: bool) -> None:
    """Slots, scratch and residents fit the room, every streamed gate has a slot to go to; else two slots would not."""
    gates = [Sized(n, size, passes, scratch_bytes=scratch) for n, (size, passes, scratch) in enumerate(sizes)]
    with suppress(DeviceMemoryFull):
        planned = plan(gates, room, keep)
        streamed = [g for g in gates if g not in planned.residents]
        assert planned.size_bytes <= room
        assert sum(g.size_bytes for g in planned.residents) + planned.scratch_bytes <= room
        assert all(g.scratch_bytes <= planned.scratch_bytes for g in gates)
        assert all(g.size_bytes <= planned.large.slot_bytes for g in streamed)
        assert not streamed or planned.large.slot_count >= 2
        return
    largest, scratch = max(g.size_bytes for g in gates), max(g.scratch_bytes for g in gates)
    assert room < 2 * largest + 8 * largest / 16 + scratch


@given(
    st.lists(st.tuples(st.integers(1, 1000), st.booleans(), st.integers(0, 2000)), min_size=1, max_size=60),
    st.booleans(),
    st.permutations([2, 3, 4]),
)
def test_the_least_room_is_enough_and_a_byte_less_is_not(
    sizes: list[tuple[int, bool, int]], keep: bool, slot_counts: list[int]
) -> None:
    """Whatever the gates: pinned ones stay, each of the others has a slot to go to, and what is unpacked a scratch."""
    gates = [Sized(n, size, 1, pinned, scratch) for n, (size, pinned, scratch) in enumerate(sizes)]
    least = least_room(gates, keep, slot_counts)
    planned = plan(gates, least, keep, slot_counts)

    assert planned.size_bytes <= least
    assert planned.residents >= {g for g in gates if g.pinned}
    assert all(g.size_bytes <= planned.large.slot_bytes for g in gates if g not in planned.residents)
    with pytest.raises(DeviceMemoryFull):
        plan(gates, least - 1, keep, slot_counts)


def test_what_is_passed_most_stays_first() -> None:
    """A denoiser's gates before an encoder's, whatever their order."""
    encoder = [Sized(n, 10, passes=1) for n in range(5)]
    denoiser = [Sized(n + 5, 10, passes=10) for n in range(5)]

    assert plan_residents([*encoder, *denoiser], 50) == set(denoiser)
    assert plan_residents([*encoder, *denoiser], 70) > set(denoiser)
