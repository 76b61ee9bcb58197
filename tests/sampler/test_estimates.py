"""What is learnt of costs, and that it stays bounded."""

from __future__ import annotations

import pytest

from services.sampler.estimates import KIND_LIMIT, PassCosts, StepCosts
from services.sampler.riders import Rider


def test_a_pass_costs_what_its_gates_cost_last() -> None:
    costs = PassCosts()
    assert costs.pass_s("kind") == 0
    for gate, seconds in (("a", 1.0), ("b", 2.0), ("a", 0.5)):
        costs.took("kind", gate, seconds)

    assert costs.pass_s("kind") == pytest.approx(2.5)
    assert costs.pass_s("other") == 0


def test_what_took_long_once_is_not_believed() -> None:
    """A first pass that loads kernels is forgotten with the second; one that recorded graphs counts for little."""
    costs = PassCosts()
    for seconds in (9.0, 1.0, 9.0):
        costs.took("kind", "a", seconds)
    assert costs.pass_s("kind") == pytest.approx(1.1)
    for _ in range(40):
        costs.took("kind", "a", 9.0)

    assert costs.pass_s("kind") == pytest.approx(9.0)


def test_steps_are_reckoned_one_by_one() -> None:
    """Three steps seen at once are three; later ones change the figure slowly."""
    left = [9]
    rider = Rider(lambda rider: None, lambda rider: None, kind="kind", steps_left=lambda: left[0])
    costs = StepCosts()
    left[0], rider.compute_s = 6, 6.0
    costs.look(rider)
    assert costs.remaining_s(rider) == pytest.approx(6 * 2.0)
    left[0], rider.compute_s = 5, 10.0
    costs.look(rider)

    assert costs.remaining_s(rider) == pytest.approx(5 * 2.5)


def test_kinds_are_forgotten() -> None:
    """Callers choose sizes; what is remembered of them has a limit."""
    passes, steps = PassCosts(), StepCosts()
    for n in range(KIND_LIMIT + 10):
        passes.took(n, "gate", 1.0)
        steps._learn(n, 1.0)

    assert [passes.pass_s(n) for n in (0, 9, 10, KIND_LIMIT + 9)] == [0, 0, 1, 1]
    assert len(steps._step_s) == KIND_LIMIT
