"""Three models share a budget for two, in short; bench/budget.py does it for as long as one likes."""

from __future__ import annotations

import random

from tests.loader.rotation import rotate
from tests.loader.support import Workbench


def test_three_models_share_a_budget_for_two(bench: Workbench) -> None:
    """Never more than the budget, nothing leased goes, no wrong byte; who finds no room waits until another lets go."""
    seed = random.randrange(1 << 16)
    print("seed", seed)
    seen = rotate(bench, seconds=4, seed=seed)
    print(seen)

    assert seen["wrong_bytes"] == 0
    assert seen["lost_leases"] == 0
    assert seen["peak_bytes"] <= seen["budget_bytes"]
    assert seen["peak_bytes"] > seen["budget_bytes"] // 2  # the watch sees what is there
    assert seen["prepares"] > 9
    assert seen["evictions"] > 2
