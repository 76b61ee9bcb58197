"""A world in virtual time for the real engine: a bus, compute, arrivals and faults, all by the clock's hand.

Riders are real threads under the real baton. Time passes only where a gate is brought and where a rider computes, and
whatever is due by then (an arrival, a cancel, bytes that become READY) happens before anything else.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from services.sampler.engine import Engine
from services.sampler.gates import Gate
from services.sampler.meter import WallMeter
from services.sampler.riders import Rider
from services.sampler.transfer import ArenaViews

BYTES_PER_S = 1000.0
WAIT_S = 20


class Stop(Gate):
    """A gate whose readiness a test decides."""

    ready = True

    def is_ready(self) -> bool:
        return self.ready


class Arena:
    """Stands for a component's arena."""

    extents = ()


class Bus(ArenaViews):
    """Brings one gate after the other, the next one or two while riders compute, as a ring of three slots does."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.streamed_bytes = 0
        self.opened: list[Gate] = []
        self.open: Gate | None = None
        self.bytes_of: dict[Gate, int] = {}
        self.faults: dict[Gate, list[Exception]] = {}  # raised, one by one, when the gate is brought
        self.leave_faults: dict[Gate, list[Exception]] = {}
        self.ahead_faults: list[Exception] = []
        self._free_s = 0.0
        self._slots: dict[Gate, float] = {}  # when a gate is there

    def enter(self, gate: Gate) -> None:
        assert self.open is None, f"{gate} is opened while {self.open} is open"
        assert gate.is_ready()
        if self.faults.get(gate):
            raise self.faults[gate].pop(0)
        self.opened.append(gate)
        self.world.pass_to(self._bring(gate))
        self.open = gate

    def leave(self, gate: Gate) -> None:
        assert self.open is gate
        self.open = None
        self._slots.pop(gate, None)
        if self.leave_faults.get(gate):
            raise self.leave_faults[gate].pop(0)

    def prefetch(self, gate: Gate, upcoming: Iterator[Gate]) -> None:
        if self.ahead_faults:
            raise self.ahead_faults.pop(0)
        near = [g for g in itertools.islice(upcoming, 2) if g is not gate and g.is_ready()]
        self._slots = {g: s for g, s in self._slots.items() if g is gate or g in near}
        for following in near:
            self._bring(following)

    def empty(self) -> None:
        """Forget what was brought."""
        self._slots.clear()

    def streamed_bytes_of(self, gate: Gate) -> int:
        return self.bytes_of[gate]

    def _bring(self, gate: Gate) -> float:
        size = self.bytes_of[gate]
        if not size:
            return self.world.now
        if gate not in self._slots:
            self._free_s = self._slots[gate] = max(self._free_s, self.world.now) + size / BYTES_PER_S
            self.streamed_bytes += size
        return self._slots[gate]


@dataclass(eq=False)
class Ride:
    """A rider's way through components, and how it went."""

    world: World
    plan: list[tuple[list[Stop], int]]  # (gates of a component, passes over them)
    gate_s: float  # compute at each gate
    kind: object
    steps: int
    seed: int = 0
    fault: Exception | None = None  # raised by its second gate's compute
    rider: Rider = field(init=False)
    done: threading.Event = field(default_factory=threading.Event)
    came: bool = False
    seated_s: float = 0.0
    ended_s: float = 0.0
    steps_left: int = 0

    def __post_init__(self) -> None:
        self.steps_left = self.steps
        self.rider = Rider(self._work, self._end, kind=self.kind, steps_left=lambda: self.steps_left)

    def _work(self, rider: Rider) -> int:
        value = self.seed
        for gates, passes in self.plan:
            for _ in range(passes):
                for gate in gates:
                    self.world.engine.arrive(gate)
                    self._assert_open(gate)
                    value = compute(value, gate)
                    if self.fault is not None and gate.name == "1":
                        raise self.fault
                    self.world.pass_for(self.gate_s)
                    self._assert_open(gate)
                if passes > 1:
                    self.steps_left -= 1
        return value

    def _assert_open(self, gate: Gate) -> None:
        assert gate.pinned or self.world.bus.open is gate, f"{gate} is computed while {self.world.bus.open} is open"

    def alone(self) -> int:
        """The result that it has when it rides alone."""
        value = self.seed
        for gates, passes in self.plan:
            for gate in gates * passes:
                value = compute(value, gate)
        return value

    def _end(self, rider: Rider) -> None:
        self.ended_s = self.world.now
        self.done.set()

    @property
    def took_s(self) -> float:
        return self.ended_s - self.seated_s


def compute(value: int, gate: Gate) -> int:
    """Depends on the order of gates and on what went before."""
    return (value * 31 + int(gate.name) + 1) % (1 << 61)


class World:
    """A clock, a bus, an engine, and what is to happen when."""

    def __init__(self) -> None:
        self.now = 0.0
        self.bus = Bus(self)
        self.engine = Engine(self.bus, WallMeter(BYTES_PER_S, lambda: self.now), lambda: self.now)
        self.rides: list[Ride] = []
        self._due: list[tuple[float, int, Callable[[], object]]] = []
        self._number = itertools.count()

    def component(self, name: str, gate_count: int, gate_bytes: int) -> list[Stop]:
        arena: Any = Arena()
        gates = [Stop(name, str(n), nn.Identity(), arena, ()) for n in range(gate_count)]
        self.bus.bytes_of.update((gate, gate_bytes) for gate in gates)
        return gates

    # ---- what is to happen

    def at(self, when_s: float, what: Callable[[], object]) -> None:
        heapq.heappush(self._due, (when_s, next(self._number), what))

    def arrival(self, when_s: float, plan: list[tuple[list[Stop], int]], gate_s: float, **more: Any) -> Ride:
        steps = max((passes for _, passes in plan if passes > 1), default=0)
        ride = Ride(self, plan, gate_s, **{"kind": gate_s, "steps": steps, **more})
        self.rides.append(ride)

        def seat() -> None:
            ride.seated_s, ride.came = self.now, True
            self._heard(lambda: self.engine.ride(ride.rider))

        self.at(when_s, seat)
        return ride

    def cancel(self, when_s: float, ride: Ride) -> None:
        self.at(when_s, lambda: self._heard(lambda: self.engine.cancel(ride.rider)))

    def ready(self, when_s: float, gate: Stop) -> None:
        """The gate's bytes are missing until then."""
        gate.ready = False

        def fill() -> None:
            gate.ready = True
            self._heard(self.engine.wake)

        self.at(when_s, fill)

    def _heard(self, news: Callable[[], object]) -> None:
        """Bring news, and wait until the engine has it: threads start when they like, the clock does not wait."""
        idle, before = self.engine._idle, len(self.engine._news)
        news()
        deadline = time.monotonic() + WAIT_S
        while not idle and len(self.engine._news) == before:
            assert time.monotonic() < deadline
            time.sleep(0)

    # ---- time

    def pass_for(self, seconds: float) -> None:
        self.pass_to(self.now + seconds)

    def pass_to(self, when_s: float) -> None:
        while self._due and self._due[0][0] <= when_s:
            due_s, _, what = heapq.heappop(self._due)
            self.now = max(self.now, due_s)
            what()
        self.now = max(self.now, when_s)

    def run(self) -> None:
        """Until nothing is to happen any more and every rider has ended."""
        while self._due:
            due_s, _, what = heapq.heappop(self._due)  # one only: from then on riders make time pass
            self.now = max(self.now, due_s)
            what()
            self._rest()
        for ride in self.rides:
            assert ride.done.wait(WAIT_S), "a rider is left standing"
        self._rest()

    def _rest(self) -> None:
        """Wait until the baton lies on the table and all who came have ended or stand."""
        deadline = time.monotonic() + WAIT_S
        while not self._is_at_rest():
            assert time.monotonic() < deadline, "the engine does not come to rest"
            time.sleep(0.0002)

    def _is_at_rest(self) -> bool:
        if not self.engine._idle:
            return False
        standing = self.engine._sweeps.standing()
        return all(ride.done.is_set() or not ride.came or ride.rider in standing for ride in self.rides)


def fault() -> Exception:
    """What torch raises when a device has failed."""
    return torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
