"""What riders will cost, learnt from what riders of their kind did cost. Seconds; no clock, no torch.

Riders of one kind (model, size, what makes the batch) compute the same shapes. Nothing here decides a pixel: a wrong
estimate costs time only.
"""

from __future__ import annotations

from collections.abc import Hashable

from services.sampler.riders import Rider

# Kinds remembered at once; callers choose sizes, so there may be any number of them.
KIND_LIMIT = 512


# Something else may lengthen a stretch once (a kernel is loaded, a graph recorded); what became slower for good is
# believed bit by bit.
GROWTH = 1.1


class PassCosts:
    """Compute of one pass over a component's gates, by kind: for each gate the latest figure, or little more."""

    def __init__(self) -> None:
        self._gate_s: dict[Hashable, dict[object, float]] = {}
        self._pass_s: dict[Hashable, float] = {}

    def pass_s(self, kind: Hashable) -> float:
        """Seconds of a whole pass; of what is known of it so far, 0 for a kind that was not seen."""
        return self._pass_s.get(kind, 0.0)

    def took(self, kind: Hashable, gate: object, seconds: float) -> None:
        if kind not in self._gate_s:
            if len(self._gate_s) >= KIND_LIMIT:
                oldest = next(iter(self._gate_s))
                del self._gate_s[oldest], self._pass_s[oldest]
            self._gate_s[kind], self._pass_s[kind] = {}, 0.0
        gates = self._gate_s[kind]
        before = gates.get(gate, 0.0)
        gates[gate] = min(seconds, GROWTH * before) if before else seconds
        self._pass_s[kind] += gates[gate] - before


class StepCosts:
    """Compute of one step, by kind: a running mean over what riders' counts of steps and seconds say."""

    def __init__(self) -> None:
        self._step_s: dict[Hashable, float] = {}

    def remaining_s(self, rider: Rider) -> float:
        """Compute that the rider's remaining steps will take; 0 for a kind that was not seen."""
        return rider.steps_left() * self._step_s.get(rider.kind, 0.0)

    def look(self, rider: Rider) -> None:
        """Learn from a rider that has ended a pass; several passes may make a step."""
        left = rider.steps_left()
        steps = rider.seen_steps_left - left
        if steps > 0:
            self._learn(rider.kind, (rider.compute_s - rider.seen_compute_s) / steps)
        if steps:
            rider.seen_steps_left, rider.seen_compute_s = left, rider.compute_s

    def _learn(self, kind: Hashable, step_s: float) -> None:
        known = self._step_s.pop(kind, step_s)
        if len(self._step_s) >= KIND_LIMIT:
            del self._step_s[next(iter(self._step_s))]
        self._step_s[kind] = 0.75 * known + 0.25 * step_s
