"""A rider: one picture's pipeline call, in a thread of its own, that stops at gates.

The rider's thread runs only while it holds the engine's baton, and gives the baton on at each gate.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from services.sampler.gates import Gate


@dataclass(slots=True)
class Costs:
    """What a rider's picture cost so far."""

    streamed_bytes: int = 0
    stall_s: float = 0.0


class Rider:
    """Work that the engine runs under its baton.

    `work(rider)` is called once in the rider's thread; its value or exception ends up in `result` / `error`, and
    `on_done(rider)` is called in that thread after the baton was given on. `on_gate(gate, waits)` is called when the
    rider has to wait for a gate's bytes (True) and when it passes a gate, or another rider does for it what comes there
    (False); `on_pause()` before it gives the baton on at a gate.

    Riders of one `kind` compute the same shapes and so take the same time; `steps_left()` says how many steps are still
    to be made. Both are for estimates only.
    """

    def __init__(
        self,
        work: Callable[[Rider], object],
        on_done: Callable[[Rider], None],
        on_gate: Callable[[Gate, bool], None] = lambda gate, waits: None,
        on_pause: Callable[[], None] = lambda: None,
        kind: Hashable = None,
        steps_left: Callable[[], int] = lambda: 0,
    ) -> None:
        self.work = work
        self.on_done = on_done
        self.on_gate = on_gate
        self.on_pause = on_pause
        self.kind = kind
        self.steps_left = steps_left
        self.result: object = None
        self.error: BaseException | None = None
        self.fault: Exception | None = None  # raised in the rider's thread when it runs next
        self.gate: Gate | None = None  # where it stands; None before the first gate and between gates
        self.costs = Costs()
        # What the engine keeps of it.
        self.seated_s = 0.0  # when it was given to the engine
        self.sweep: object = None  # the latest that carried it
        self.mark: object = None  # the meter's, while it computes
        self.compute_s = 0.0
        self.seen_steps_left = steps_left()
        self.seen_compute_s = 0.0
        # One lock a rider: with a shared condition a hand-over costs milliseconds at 200 riders.
        self.turn = threading.Lock()
        self.turn.acquire()

    def raise_fault(self) -> None:
        """End the rider's work if it was cancelled, or if its params could not be brought."""
        if self.fault is not None:
            raise self.fault
