"""How long things take on a device, read without making anybody wait."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

Sink = Callable[[float], None]
# Large enough to reach the bus's rate, small enough to be nobody's budget.
PROBE_BYTES = 16 << 20
PROBE_COUNT = 4


class Meter(Protocol):
    """Measures stretches of compute. Used by the holder of the baton only."""

    bus_bytes_per_s: float  # rate at which params reach the device

    def start(self) -> object:
        """A mark before the compute of a rider at a gate."""
        ...

    def stop(self, mark: object, sink: Sink) -> None:
        """The compute has been asked for: `sink` gets its seconds, now or at a later call."""
        ...


class WallMeter:
    """A CPU computes while one waits for it, so the clock on the wall tells."""

    def __init__(self, bus_bytes_per_s: float = 1e6, clock: Callable[[], float] = time.perf_counter) -> None:
        # A CPU has no bus. What the test ring copies counts as if it came slowly, so that riders share sweeps there as
        # they do on a GPU; arena views count as nothing.
        self.bus_bytes_per_s = bus_bytes_per_s
        self._clock = clock

    def start(self) -> float:
        return self._clock()

    def stop(self, mark: object, sink: Sink) -> None:
        assert isinstance(mark, float)
        sink(self._clock() - mark)


class CudaMeter:
    """Pairs of events on the compute stream, read once they have passed; the host never waits for them.

    A stretch begins after the wait for its gate's bytes, so that waiting for the bus is not counted. Where launching
    is slower than computing, the device's idle time is: it is part of what the rider costs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spare: list[torch.cuda.Event] = []
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event, Sink]] = deque()
        self.bus_bytes_per_s = self._probe_bus()

    def start(self) -> torch.cuda.Event:
        self._read()
        return self._record()

    def stop(self, mark: object, sink: Sink) -> None:
        assert isinstance(mark, torch.cuda.Event)
        self._pending.append((mark, self._record(), sink))

    def _record(self) -> torch.cuda.Event:
        event = self._spare.pop() if self._spare else timing_event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _read(self) -> None:
        while self._pending and has_passed(self._pending[0][1]):
            start, end, sink = self._pending.popleft()
            self._spare += (start, end)
            sink(seconds_between(start, end))

    def _probe_bus(self) -> float:
        """Bytes per second from page-locked memory; once, at start."""
        host = torch.empty(PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
        there = torch.empty(PROBE_BYTES, dtype=torch.uint8, device=self._device)
        there.copy_(host, non_blocking=True)  # the first copy pays for more than itself
        start = self._record()
        for _ in range(PROBE_COUNT):
            there.copy_(host, non_blocking=True)
        end = self._record()
        end.synchronize()
        self._spare += (start, end)
        return PROBE_COUNT * PROBE_BYTES / seconds_between(start, end)


def open_meter(device: torch.device) -> Meter:
    """The meter for a device."""
    return CudaMeter(device) if device.type == "cuda" else WallMeter()


def timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def has_passed(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]


def seconds_between(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    return float(start.elapsed_time(end)) / 1e3
