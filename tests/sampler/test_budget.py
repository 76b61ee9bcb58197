"""What a VRAM budget is divided into, and the least that works."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from services.sampler.budget import GIB, UNLIMITED_BYTES, Budget, budget_bytes, gib_up

sizes = st.integers(1, 1 << 36) | st.integers(1, 1000)


@given(sizes, st.integers(0, 2 * GIB), st.booleans())
@example(15, 0, True)
def test_the_least_budget_is_enough_and_a_byte_less_is_not(ring: int, outside: int, has_graphs: bool) -> None:
    """With the share of graphs too, which depends on the budget."""
    least = Budget(0, outside, has_graphs).least_bytes(ring)

    assert Budget(least, outside, has_graphs).ring_bytes >= ring
    assert Budget(least - 1, outside, has_graphs).ring_bytes < ring


@given(sizes)
def test_a_budget_that_is_named_is_no_less_than_what_is_needed(size: int) -> None:
    """Two decimals are rounded up, and read again as the flag is."""
    named = budget_bytes(float(gib_up(size)), UNLIMITED_BYTES)

    assert size <= named <= size + GIB / 100 + 1


def test_a_negative_budget_is_what_is_free_less_that() -> None:
    """0 is all that is free, and nobody gets more than that."""
    assert [budget_bytes(gib, 8 * GIB) for gib in (-1, 0, 3, 11)] == [7 * GIB, 8 * GIB, 3 * GIB, 8 * GIB]


def test_a_refusal_names_the_least_budget_and_what_it_is_made_of() -> None:
    """The sentence is for the operator; where no budget of this device works, it says so."""
    budget = Budget(4 * GIB, GIB // 2, has_graphs=True, free_bytes=6 * GIB)

    assert str(budget.too_small(GIB, 3 * GIB)) == (
        "the VRAM budget of 4.00 GiB is too small: --max-vram 4.77 is the least that works "
        "(1.00 GiB for params and 3.00 for the work of pictures, 0.77 for CUDA and its graphs)"
    )
    assert str(budget.too_small(3 * GIB, 3 * GIB)).endswith("; only 6.00 GiB of the device are free")
