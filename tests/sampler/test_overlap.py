"""What a pass takes when copies run ahead by a few slots, and the compute that hides them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.sampler.overlap import TOLERANCE, hiding_load_s, pass_s

gates = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=40)


@given(gates, st.integers(2, 6))
def test_a_pass_takes_no_less_than_either_and_no_more_than_both(pairs: list[tuple[int, int]], slots: int) -> None:
    copies, computes = zip(*pairs, strict=True)

    assert max(sum(copies), sum(computes)) <= pass_s(copies, computes, slots) <= sum(copies) + sum(computes)


@given(gates, st.integers(2, 6))
def test_more_slots_never_make_a_pass_longer(pairs: list[tuple[int, int]], slots: int) -> None:
    copies, computes = zip(*pairs, strict=True)

    assert pass_s(copies, computes, slots + 1) <= pass_s(copies, computes, slots)


@pytest.mark.parametrize("compute_s", [0.0, 0.5, 1.0, 3.0])
def test_equal_gates_take_the_longer_of_both(compute_s: float) -> None:
    """Blocks of one kind: the bus is hidden by as much compute as it takes, whatever the riders."""
    assert pass_s([1.0] * 30, [compute_s] * 30, 3) == pytest.approx(30 * max(1.0, compute_s))
    assert hiding_load_s([1.0] * 30, [compute_s] * 30, 3) == 30


def test_bytes_where_little_is_computed_are_waited_for() -> None:
    """As much compute as copies, each in its own half: slots reach a few gates far, so the bus is waited for."""
    copies, computes = [1.0] * 20 + [0.1] * 20, [0.1] * 20 + [1.0] * 20
    alone_s = pass_s(copies, computes, 3)
    load_s = hiding_load_s(copies, computes, 3)

    assert alone_s > 1.6 * sum(copies)
    assert load_s > 1.6 * sum(copies)
    assert pass_s(copies, computes, 40) == pytest.approx(sum(copies), rel=0.2)


@given(gates, st.integers(2, 6))
def test_the_load_that_hides_is_never_less_than_the_copies(pairs: list[tuple[int, int]], slots: int) -> None:
    copies, computes = zip(*pairs, strict=True)
    load_s = hiding_load_s(copies, computes, slots)

    assert load_s >= sum(copies)
    if sum(computes) and sum(copies):
        before_s = pass_s(copies, [each * sum(copies) / sum(computes) for each in computes], slots)
        assert load_s > sum(copies) or before_s <= (1 + TOLERANCE) * sum(copies)
