"""The engine with plain modules: order, sharing of gates, waiting for bytes, cancels, faults."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import nn

from services.errors import Cancelled, DeviceGone, HeadwaterError
from services.sampler.engine import Engine
from services.sampler.gates import Gate
from services.sampler.riders import Rider
from services.sampler.transfer import ArenaViews
from tests.sampler.world import fault


class Bytes:
    """An arena for gates without params: one extent a gate, READY when a test says so."""

    def __init__(self, count: int) -> None:
        self.extents = ()
        self.missing: set[int] = set()
        self.count = count


class Lane(ArenaViews):
    """Records which gates were opened. A gate takes long to bring, so that riders share sweeps."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.broken: set[str] = set()
        self.on_leave: Callable[[], object] = lambda: None

    def streamed_bytes_of(self, gate: Gate) -> int:
        return 1 << 30

    def leave(self, gate: Gate) -> None:
        self.on_leave()

    def enter(self, gate: Gate) -> None:
        if gate.name in self.broken:
            raise RuntimeError("no such memory")
        self.opened.append(gate.name)


class Stop(Gate):
    """A gate whose readiness a test decides."""

    ready = True

    def is_ready(self) -> bool:
        return self.ready


class Road:
    """An engine, a component of numbered gates, and riders that drive along it."""

    def __init__(self, gate_count: int = 4) -> None:
        self.lane = Lane()
        self.engine = Engine(self.lane)
        arena: Any = Bytes(gate_count)
        self.gates = [Stop("road", str(n), nn.Identity(), arena, ()) for n in range(gate_count)]

    def drive(
        self, laps: int = 1, on_gate: Callable[[Gate, bool], None] = lambda g, w: None
    ) -> tuple[Rider, Future[None]]:
        done: Future[None] = Future()

        def work(rider: Rider) -> int:
            for _ in range(laps):
                for gate in self.gates:
                    self.engine.arrive(gate)
            return laps

        rider = Rider(work, lambda rider: done.set_result(None), on_gate)
        self.engine.ride(rider)
        return rider, done


@pytest.fixture
def road() -> Road:
    return Road()


def hold(road: Road) -> tuple[threading.Event, Future[None]]:
    """Keep the baton until the event is set, so that riders that come meanwhile start together."""
    release, done, held = threading.Event(), Future[None](), threading.Event()

    def work(rider: Rider) -> None:
        held.set()
        release.wait(20)

    road.engine.ride(Rider(work, lambda rider: done.set_result(None)))
    assert held.wait(20)
    return release, done


def test_a_lone_rider_passes_every_gate(road: Road) -> None:
    """Gates open in the order in which the rider reaches them."""
    rider, done = road.drive(laps=2)
    done.result(20)

    assert rider.error is None
    assert rider.result == 2
    assert road.lane.opened == ["0", "1", "2", "3"] * 2


def test_riders_share_a_sweep(road: Road) -> None:
    """Three riders that start together open each gate once."""
    release, held = hold(road)
    rides = [road.drive() for _ in range(3)]
    release.set()
    for _, done in [*rides, (None, held)]:
        done.result(20)

    assert road.lane.opened == ["0", "1", "2", "3"]


def test_who_waits_for_bytes_stops_nobody(road: Road) -> None:
    """A rider at a gate that is not READY waits; another component's rider goes on; then both end."""
    other = Road()
    other.engine, other.lane = road.engine, road.lane
    road.gates[2].ready = False
    waits = threading.Event()
    rider, done = road.drive(on_gate=lambda gate, waiting: waits.set() if waiting else None)
    assert waits.wait(20)
    free, free_done = other.drive(laps=3)
    free_done.result(20)
    assert free.error is None
    assert not done.done()
    road.gates[2].ready = True
    road.engine.wake()
    done.result(20)

    assert rider.error is None
    assert rider.costs.stall_s > 0


def test_cancel_reaches_a_waiting_rider(road: Road) -> None:
    """A rider that waits for bytes ends at once when cancelled, and the next one rides on."""
    road.gates[1].ready = False
    waits = threading.Event()
    rider, done = road.drive(on_gate=lambda gate, waiting: waits.set() if waiting else None)
    assert waits.wait(20)
    road.engine.cancel(rider)
    done.result(20)
    assert isinstance(rider.error, Cancelled)
    road.gates[1].ready = True
    after, after_done = road.drive()
    after_done.result(20)

    assert after.error is None


def stand_by(road: Road) -> tuple[Rider, Future[None], Callable[[], None]]:
    """A rider that waits in front of gate 1 until the callback is called."""
    calls: Future[Callable[[], None]] = Future()
    done: Future[None] = Future()

    def work(rider: Rider) -> None:
        road.engine.arrive(road.gates[0])
        road.engine.stand_by(road.gates[1], calls.set_result)
        road.engine.arrive(road.gates[1])

    rider = Rider(work, lambda rider: done.set_result(None))
    road.engine.ride(rider)
    return rider, done, calls.result(20)


def test_who_stands_by_stops_nobody(road: Road) -> None:
    """A rider that waits for something outside lets others through the very gates it wants, then goes on."""
    rider, done, go_on = stand_by(road)
    other, other_done = road.drive(laps=3)
    other_done.result(20)
    assert other.error is None
    assert not done.done()
    go_on()
    done.result(20)

    assert rider.error is None
    assert road.lane.opened[-1] == "1"


def test_cancel_reaches_who_stands_by(road: Road) -> None:
    """It ends at once; what it waited for may come later."""
    rider, done, go_on = stand_by(road)
    road.engine.cancel(rider)
    done.result(20)
    go_on()
    after, after_done = road.drive()
    after_done.result(20)

    assert isinstance(rider.error, Cancelled)
    assert after.error is None


def test_cancel_before_the_start(road: Road) -> None:
    """A rider that was cancelled before it had the baton does nothing."""
    release, held = hold(road)
    rider, done = road.drive()
    road.engine.cancel(rider)
    release.set()
    done.result(20)
    held.result(20)

    assert isinstance(rider.error, Cancelled)
    assert road.lane.opened == []


def test_a_fill_that_fails_ends_who_waits(road: Road) -> None:
    """`fail` gives the reason to riders at gates without bytes and to nobody else."""
    road.gates[1].ready = False
    waits = threading.Event()
    rider, done = road.drive(on_gate=lambda gate, waiting: waits.set() if waiting else None)
    assert waits.wait(20)
    road.engine.fail(road.gates, HeadwaterError("the disk is gone"))
    done.result(20)

    assert isinstance(rider.error, HeadwaterError)


def test_what_a_rider_says_while_another_does_its_work(road: Road) -> None:
    """It pauses before it passes for passing the gate: who measures it in between measures nobody else."""
    said: list[object] = []
    ended: Future[None] = Future()

    def work(rider: Rider) -> None:
        road.engine.stand_by(road.gates[0], lambda done: done(), prepares=False)

    rider = Rider(
        work,
        lambda rider: ended.set_result(None),
        lambda gate, waits: said.append(waits),
        lambda: said.append("pause"),
    )
    road.engine.ride(rider)
    ended.result(20)

    assert said == ["pause", False, False]


def test_who_comes_after_a_fill_has_failed(road: Road) -> None:
    """Also a rider that came to no gate yet, as one that waited for another to encode its prompt."""
    road.gates[1].ready = False
    road.engine.fail(road.gates, HeadwaterError("the disk is gone"))
    rider, done = road.drive()
    done.result(20)

    assert isinstance(rider.error, HeadwaterError)


def test_a_device_that_is_lost_outside_of_riders_work(road: Road) -> None:
    """An error while a finished picture is fetched ends all riders, if it says that the device is gone; else nobody."""
    road.gates[1].ready = False
    waits = threading.Event()
    rider, done = road.drive(on_gate=lambda gate, waiting: waits.set() if waiting else None)
    assert waits.wait(20)
    assert road.engine.lost(ValueError("no picture")) is None
    assert road.engine.gone is None
    assert isinstance(road.engine.lost(fault()), DeviceGone)
    done.result(20)

    assert isinstance(rider.error, DeviceGone)


def test_a_broken_transfer_fails_its_riders_only(road: Road) -> None:
    """An error while a gate is brought ends the riders that stand there; the engine goes on."""
    road.lane.broken.add("2")
    rider, done = road.drive()
    done.result(20)
    assert isinstance(rider.error, RuntimeError)
    road.lane.broken.clear()
    after, after_done = road.drive()
    after_done.result(20)

    assert after.error is None


def test_order_is_learnt_from_the_first_forward(road: Road) -> None:
    """What comes after a gate is known once it was seen, and the next lap's gates too once laps follow laps."""
    road.drive(laps=2)[1].result(20)
    track = road.engine._sweeps.track(road.gates[0])

    assert [g.name for g in track.learnt] == ["0", "1", "2", "3"]
    assert [g.name for g in track.after(road.gates[2])] == ["3", "0", "1", "2"]


def test_a_sweep_starts_where_most_can_join(road: Road) -> None:
    """Of two riders that can go on, the one further back goes first, and they share the rest of the sweep."""
    road.gates[2].ready = False
    waits = threading.Event()
    _, first = road.drive(on_gate=lambda gate, waiting: waits.set() if waiting else None)
    assert waits.wait(20)
    release, held = hold(road)
    _, second = road.drive()
    road.gates[2].ready = True
    release.set()
    for done in (held, first, second):
        done.result(20)

    assert road.lane.opened == ["0", "1", "0", "1", "2", "3"]


def test_news_that_comes_as_the_baton_is_laid_down(road: Road) -> None:
    """A rider that comes while the last one closes its gate is not forgotten."""
    came: list[Future[None]] = []

    def come() -> None:
        if not came:
            came.append(road.drive()[1])
            deadline = time.monotonic() + 10
            while not road.engine._news and time.monotonic() < deadline:
                time.sleep(0.001)

    del road.gates[1:]  # one gate: it is closed when the rider has ended
    road.lane.on_leave = come
    road.drive()[1].result(20)

    assert came
    came[0].result(20)


def test_model_code_outside_a_rider_is_refused(road: Road) -> None:
    """A forward on a thread that holds no baton is a bug, and says so."""
    with pytest.raises(RuntimeError, match="outside a rider"):
        road.engine.arrive(road.gates[0])


@pytest.mark.parametrize("seed", range(4))
def test_storm_of_riders_and_cancels(seed: int) -> None:
    """Riders that come, wait and are cancelled in any order all end, and the baton is never lost."""
    import random

    rng = random.Random(seed)
    road = Road(6)
    rides = []
    for n in range(60):
        rides.append(road.drive(laps=rng.randrange(1, 4)))
        road.gates[rng.randrange(6)].ready = rng.random() < 0.8
        if rng.random() < 0.5:
            road.engine.cancel(rng.choice(rides)[0])
        if n % 7 == 0:
            road.engine.wake()
    for gate in road.gates:
        gate.ready = True
    road.engine.wake()
    for rider, done in rides:
        done.result(30)
        assert rider.error is None or isinstance(rider.error, Cancelled)

    last, done = road.drive()
    done.result(20)
    assert last.error is None


def test_tensors_made_by_riders_are_ordinary() -> None:
    """Outside a drawing a rider's thread makes ordinary tensors: what is built there outlives it."""
    done: Future[None] = Future()
    rider = Rider(lambda rider: torch.zeros(2), lambda rider: done.set_result(None))
    Engine(ArenaViews()).ride(rider)
    done.result(20)

    assert isinstance(rider.result, torch.Tensor)
    assert not rider.result.is_inference()
