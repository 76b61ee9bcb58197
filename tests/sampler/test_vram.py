"""What a process takes of a device beside torch's allocations, as kernels are loaded."""

from __future__ import annotations

from services.sampler.vram import FIRST_BYTES, LATER_BYTES, STEP_BYTES, Outside

GIB = 1 << 30


def test_what_is_expected_is_always_more_than_what_is() -> None:
    """Kernels that a first picture loads were expected, and change nothing; more than that is expected from then on."""
    taken = GIB // 2
    outside = Outside(lambda: taken)
    first = outside.look()

    assert taken + FIRST_BYTES <= first < taken + FIRST_BYTES + STEP_BYTES
    taken += FIRST_BYTES - LATER_BYTES
    assert outside.look() == first
    taken += GIB // 4
    assert taken + LATER_BYTES <= outside.look() < taken + LATER_BYTES + STEP_BYTES
