"""What torch may allocate of a budget, as the process takes more beside it."""

from __future__ import annotations

from services.sampler.vram import FIRST_BYTES, LATER_BYTES, STEP_BYTES, Allowance

GIB = 1 << 30


def test_the_budget_holds_while_kernels_are_loaded() -> None:
    """Whatever was loaded, what torch may take and what the process takes beside it are within the budget."""
    outside, limits = GIB // 2, list[int]()
    allowance = Allowance(4 * GIB, lambda: outside, limits.append)
    first = allowance.look()

    assert first <= 4 * GIB - outside - FIRST_BYTES < first + STEP_BYTES
    outside += FIRST_BYTES - LATER_BYTES  # as expected
    assert allowance.look() == first
    outside += GIB // 4
    assert allowance.look() <= 4 * GIB - outside - LATER_BYTES < allowance.look() + STEP_BYTES
    assert limits == sorted(limits, reverse=True)
    assert limits[0] == first


def test_a_budget_below_what_cuda_takes_is_negative() -> None:
    assert Allowance(GIB // 2, lambda: GIB // 2, lambda allowed: None).look() < 0
