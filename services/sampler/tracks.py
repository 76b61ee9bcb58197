"""The gates of one component in the order of its forwards, and what passing them costs."""

from __future__ import annotations

from collections.abc import Iterator

from services.sampler.estimates import PassCosts
from services.sampler.gates import Gate
from services.sampler.riders import Rider


class Track:
    """The gates of one component, in the order in which forwards reach them, and who waits at them for a sweep."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.learnt: list[Gate] = []
        self.place: dict[Gate, int] = {}
        self.cycles = False  # whether forwards follow each other, as denoise steps do
        self.costs = PassCosts()
        self.waiting: dict[Gate, list[Rider]] = {}  # at gates that are READY, on no sweep
        self.turn = 0  # number of its latest sweep among all sweeps

    def reached(self, gate: Gate, before: Gate | None) -> None:
        """Learn from a rider that came to `gate` from `before`."""
        if gate not in self.place:
            self.place[gate] = len(self.learnt)
            self.learnt.append(gate)
        elif before in self.place and self.place[gate] < self.place[before]:
            self.cycles = True

    def after(self, gate: Gate, is_last_pass: bool = False) -> Iterator[Gate]:
        """The gates that will be needed after `gate`, nearest first; then the next forward's, if one follows."""
        at = self.place[gate] + 1
        yield from self.learnt[at:]
        if self.cycles and not is_last_pass:
            yield from self.learnt[:at]

    def __repr__(self) -> str:
        return f"<track {self.name} {len(self.learnt)} gates>"
