"""What the bus and the riders were busy with, seen from outside the engine.

A ring that marks where each copy begins and ends on its copy stream, and a wrapper around an engine's `arrive` that
marks where a rider's kernels begin and end on the compute stream. Marks do not wait for anything.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.riding import Mark, between_ms, mark
from services.sampler.engine import Engine
from services.sampler.gates import Gate
from services.sampler.ring import Ring
from services.sampler.slots import Slot

BUS = "bus"


@dataclass(frozen=True)
class Span:
    """A lane was busy from start_ms to end_ms, counted from the start of the trace."""

    lane: str
    name: str
    start_ms: float
    end_ms: float
    size_bytes: int = 0

    @property
    def duration_ms(self) -> float:
        return self.end_ms - self.start_ms


@dataclass
class Trace:
    """Marks as they come; `spans` once the device has passed them all."""

    device: torch.device
    start: Mark = None
    open_: dict[str, tuple[Mark, Gate]] = field(default_factory=dict)
    closed: list[tuple[str, Gate, Mark, Mark]] = field(default_factory=list)

    def begin(self, lane: str, gate: Gate) -> None:
        self.open_[lane] = (mark(self.device), gate)

    def end(self, lane: str) -> None:
        if lane in self.open_:
            begun, gate = self.open_.pop(lane)
            self.closed.append((lane, gate, begun, mark(self.device)))

    def restart(self) -> None:
        """Forget what was; time counts from here."""
        self.closed.clear()
        self.start = mark(self.device)

    def spans(self) -> list[Span]:
        """All spans by their start. The device must be idle."""
        return sorted(
            (
                Span(
                    lane, f"{gate.component}.{gate.name}".rstrip("."), between_ms(self.start, begun),
                    between_ms(self.start, ended), gate.size_bytes,
                )
                for lane, gate, begun, ended in self.closed
            ),
            key=lambda span: span.start_ms,
        )  # fmt: skip


class TracedRing(Ring):
    """A ring whose copies are marked."""

    trace: Trace

    def _bring(self, gate: Gate, slot: Slot) -> Slot:
        self._begin(lambda: self.trace.begin(BUS, gate))
        brought = super()._bring(gate, slot)
        self._on_copies(lambda: self.trace.end(BUS))
        return brought

    def _await_free(self, slot: Slot, copies: torch.cuda.Stream) -> None:
        super()._await_free(slot, copies)  # until then the copy waits for its slot, which is not the bus at work
        assert slot.gate is not None
        gate = slot.gate
        self._on_copies(lambda: self.trace.begin(BUS, gate))

    def _begin(self, begin: Callable[[], None]) -> None:
        if self._copies is None:
            begin()

    def _on_copies(self, act: Callable[[], None]) -> None:
        with torch.cuda.stream(self._copies):  # without a stream: nothing
            act()


def trace_riders(engine: Engine, trace: Trace) -> Callable[[str], None]:
    """Mark what each rider launches between two gates. Returns what names a rider's lane, and ends it with ""."""
    lanes = threading.local()
    arrive: Any = engine.arrive

    def marked(gate: Gate) -> None:
        lane = getattr(lanes, "name", "")
        trace.end(lane)
        arrive(gate)
        trace.begin(lane, gate)

    def name(lane: str) -> None:
        trace.end(getattr(lanes, "name", ""))
        lanes.name = lane

    engine.arrive = marked  # type: ignore[method-assign] # this engine only, and only to look
    return name


def stalls(spans: list[Span], at_least_ms: float) -> list[Span]:
    """Times in which no rider computed though one was to. Lane "bus" where a copy was under way, else "host"."""
    computing = [span for span in spans if span.lane != BUS]
    copies = [span for span in spans if span.lane == BUS]
    found: list[Span] = []
    until = computing[0].end_ms if computing else 0.0
    for span in computing[1:]:
        if span.start_ms - until >= at_least_ms:
            busy = any(copy.start_ms < span.start_ms and copy.end_ms > until for copy in copies)
            found.append(Span(BUS if busy else "host", span.name, until, span.start_ms))
        until = max(until, span.end_ms)
    return found
