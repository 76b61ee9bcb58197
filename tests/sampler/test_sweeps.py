"""Whom sweeps carry, in what order, and what that costs: the real engine on a bus and a clock that tests hold."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.errors import Cancelled, DeviceGone
from services.sampler.sweeps import choose
from tests.sampler.world import BYTES_PER_S, Ride, Stop, World, fault

GATES = 8


@pytest.mark.parametrize(
    ("costs_s", "bus_s", "chosen"),
    [
        ([3, 3, 3], 10, [0, 1, 2]),  # all fit
        ([0, 0, 0], 10, [0, 1, 2]),  # not measured yet
        ([6, 6], 10, [0, 1]),  # 12 s for both, against two sweeps of 10
        ([9, 9], 10, [0, 1]),
        ([8, 8, 8], 10, [0, 1, 2]),  # the third alone would leave the bus waiting for nobody
        ([8, 8, 8, 8], 10, [0, 1]),  # two fill a sweep, and so do the other two
        ([8, 8, 8, 8, 8], 10, [0, 1]),  # nobody is taken on before one that is due sooner
        ([30, 1], 10, [0, 1]),
        ([30, 30], 10, [0]),
        ([2, 1], 0, [0]),  # resident: one at a time
        ([0, 0], 0, [0]),
        ([], 10, []),
    ],
)
def test_who_is_carried(costs_s: list[float], bus_s: float, chosen: list[int]) -> None:
    assert choose(costs_s, bus_s) == chosen


def test_who_joins_a_sweep_under_way() -> None:
    """What it carries already counts, as compute and as riders that would be delayed."""
    assert choose([1], 10.0, load_s=9, carried_count=4) == [0]
    assert choose([5], 10.0, load_s=9, carried_count=4) == [0]
    assert choose([5], 10.0, load_s=10, carried_count=4) == [0]
    assert choose([5, 5], 10.0, load_s=10, carried_count=4) == []


def transformer(world: World, gate_bus_s: float) -> list[Stop]:
    return world.component("transformer", GATES, round(gate_bus_s * BYTES_PER_S))


def known(world: World, gates: list[Stop], *costs_s: float) -> None:
    """Let one rider of each kind pass alone, so that what it costs is known; none of it is counted."""
    for n, cost_s in enumerate(costs_s):
        world.arrival(1000.0 * n, [(gates, 3)], cost_s)
    world.run()
    world.rides.clear()
    world.now = 10_000.0
    world.bus.opened.clear()
    world.bus.streamed_bytes = 0


def test_nothing_is_brought_ahead_that_nobody_comes_for() -> None:
    """After everybody's last step the bus is free for what follows, the autoencoder mostly."""
    world = World()
    gates = transformer(world, 1.0)
    known(world, gates, 0.2)
    world.bus.empty()
    for steps in (3, 5):
        world.arrival(world.now + 1, [(gates, steps)], 0.2)
    world.run()

    assert world.bus.streamed_bytes == 5 * GATES * BYTES_PER_S


def test_riders_that_fit_share_every_sweep() -> None:
    """Four riders whose compute fits in the bus time take as long together as one alone."""
    world = World()
    gates = transformer(world, 1.0)
    known(world, gates, 0.2)
    rides = [world.arrival(world.now + 1, [(gates, 5)], 0.2) for _ in range(4)]
    world.run()

    assert len(world.bus.opened) == 5 * GATES
    assert all(ride.rider.result == ride.alone() for ride in rides)
    assert max(ride.took_s for ride in rides) < 1.1 * 5 * GATES


def test_riders_that_do_not_fit_wait_for_who_is_nearly_done() -> None:
    """Beyond the bus time the one with the least work left goes first, and the mean is better for it."""
    world = World()
    gates = transformer(world, 1.0)
    known(world, gates, 1.5)
    start = world.now + 1
    long, short = world.arrival(start, [(gates, 9)], 1.5), world.arrival(start, [(gates, 3)], 1.5)
    world.run()

    one_pass_s = 1.5 * GATES
    assert short.took_s < 1.2 * 4 * one_pass_s  # the long one was seated first and ends the pass it had begun
    assert long.took_s < 1.05 * 12 * one_pass_s


def test_residents_run_shortest_first_and_are_overtaken_at_a_gate() -> None:
    """With nothing to bring, riders do not alternate: who came later with less to do goes first at the next gate."""
    world = World()
    gates = transformer(world, 0)
    known(world, gates, 1.0)
    start = world.now
    long = world.arrival(start, [(gates, 9)], 1.0)
    short = world.arrival(start + 4.5, [(gates, 2)], 1.0)
    late = world.arrival(start + 6.5, [(gates, 9)], 1.0)
    world.run()

    assert short.ended_s - start == pytest.approx(5 + 2 * GATES)
    assert long.ended_s - start == pytest.approx(11 * GATES)
    assert late.ended_s - start == pytest.approx(20 * GATES)
    turns = sum(a is not b for a, b in zip(world.bus.opened, world.bus.opened[1:], strict=False))
    assert turns <= 20 * GATES + 4


def test_a_stream_of_short_riders_does_not_starve_a_long_one() -> None:
    """Who is seated later than a rider's own remaining work never goes before it, however short."""
    world = World()
    gates = transformer(world, 0)
    known(world, gates, 1.0)
    start, work_s = world.now, 10.0 * GATES
    long = world.arrival(start, [(gates, 10)], 1.0)
    shorts = [world.arrival(start + 2 * GATES * n, [(gates, 2)], 1.0) for n in range(20)]
    world.run()

    later = [ride for ride in shorts if ride.seated_s > start + work_s]
    assert len(later) > 10
    assert all(ride.ended_s > long.ended_s for ride in later)
    assert shorts[1].ended_s < long.ended_s


def test_no_component_starves_another() -> None:
    """Before a rider passes a component it waits for at most one sweep of each other one, whoever is more or elder."""
    world = World()
    encoder = world.component("text_encoder", 3, round(BYTES_PER_S))
    gates, other = transformer(world, 1.0), world.component("other", 5, round(BYTES_PER_S))
    known(world, gates, 0.1)
    start = world.now
    for n in range(6):
        world.arrival(start, [((gates, other)[n % 2], 20)], 0.1)
    late = world.arrival(start + 5, [(encoder, 1)], 0.1)
    world.run()

    assert late.took_s <= 1.5 * (GATES + 5 + 3)


@pytest.mark.parametrize("seed", range(5))
def test_riders_that_start_at_any_moment_end_up_on_one_sweep(seed: int) -> None:
    """N riders bring at most the bytes of the longest alone, and one sweep for each that came in the middle of one."""
    world, rng = World(), random.Random(seed)
    gates = transformer(world, 1.0)
    known(world, gates, 0.05)
    rides = [world.arrival(world.now + 10 * GATES * rng.random(), [(gates, 30)], 0.05, seed=n) for n in range(6)]
    world.run()

    first, last = min(r.seated_s for r in rides), max(r.ended_s for r in rides)
    sweep_bytes = sum(world.bus.bytes_of[gate] for gate in gates)
    # One after the other they would bring 180 sweeps. Together: no longer than the last to come takes, alone.
    assert last - first <= 1.1 * (10 + 1 + 30) * GATES
    assert world.bus.streamed_bytes <= (10 + 1 + 30 + 1) * sweep_bytes
    assert all(ride.rider.result == ride.alone() for ride in rides)
    # A newcomer waits for the end of the sweep under way, once, and holds nobody else up.
    assert all(ride.took_s <= 1.1 * (1 + 30) * GATES for ride in rides)


def test_a_rider_joins_a_sweep_that_comes_by() -> None:
    """Bytes come while a sweep is under way: who waited for them joins it at that gate, and ends with it."""
    world = World()
    gates = transformer(world, 1.0)
    known(world, gates, 0.1)
    first = world.arrival(world.now + 1, [(gates, 1)], 0.1)
    world.ready(world.now + 30, gates[5])
    second = world.arrival(world.now + 20 + GATES, [(gates, 1)], 0.1)  # at gate 2 when the bytes are there
    world.run()

    assert [int(gate.name) for gate in world.bus.opened] == [*range(5), *range(GATES)]
    assert first.rider.result == first.alone()
    assert first.ended_s == pytest.approx(second.ended_s, abs=0.2)


def test_a_newcomer_passes_what_is_pinned_at_once() -> None:
    """It waits for no sweep of the transformer before it is encoded, and is on the transformer's next sweep."""
    world = World()
    gates, encoder = transformer(world, 1.0), world.component("text_encoder", 2, round(BYTES_PER_S))
    (stem,) = world.component("transformer", 1, 0)
    stem.arena, stem.pinned = gates[0].arena, True
    known(world, gates, 0.1)
    world.arrival(world.now, [(gates, 10)], 0.1)
    newcomer = world.arrival(world.now + 3.5, [([stem], 1), (encoder, 1), (gates, 1)], 0.1)
    world.run()

    assert newcomer.rider.result == newcomer.alone()
    assert newcomer.took_s < 1.2 * (GATES + 2 + GATES)


def test_a_component_of_one_gate_is_left_after_each_pass() -> None:
    """Who comes back to the gate where it stands rides the next sweep, and others have their turn between."""
    world = World()
    decoder, gates = world.component("vae", 1, round(BYTES_PER_S)), transformer(world, 1.0)
    known(world, gates, 0.1)
    slow = world.arrival(world.now, [(decoder, 200)], 0.1)
    other = world.arrival(world.now + 5, [(gates, 3)], 0.1)
    left: list[int] = []
    ended, other.rider.on_done = other.rider.on_done, lambda rider: left.append(slow.steps_left) or ended(rider)
    came: list[int] = []
    world.at(world.now + 5, lambda: came.append(slow.steps_left))
    world.run()

    assert came[0] - left[0] <= 3 + 1
    assert other.took_s < 1.5 * 3 * (GATES + 1)


def test_no_memory_to_bring_a_gate_ahead_ends_nobody() -> None:
    """What was to be brought early is brought when it is needed."""
    world = World()
    gates = transformer(world, 1.0)
    ride = world.arrival(1.0, [(gates, 3)], 0.1)
    world.bus.ahead_faults = [torch.OutOfMemoryError("CUDA out of memory")]
    world.run()

    assert ride.rider.result == ride.alone()


def test_two_passes_a_step_are_one_step_of_work() -> None:
    """What remains is reckoned by steps, however often a pipeline calls its transformer in one."""
    world = World()
    gates = transformer(world, 0)
    double = world.arrival(0.0, [(gates, 2)] * 4, 1.0, kind="double", steps=4)
    world.run()
    steps = world.engine._sweeps._steps
    double.rider.steps_left = lambda: 1

    assert double.rider.result == double.alone()
    assert steps.remaining_s(double.rider) == pytest.approx(GATES, rel=0.01)


def test_out_of_memory_ends_one_rider() -> None:
    """Where a gate finds no memory, the rider that it was opened for ends, and the others go on."""
    world = World()
    gates = transformer(world, 1.0)
    rides = [world.arrival(1.0, [(gates, 3)], 0.1, seed=n) for n in range(3)]
    world.bus.faults[gates[4]] = [torch.OutOfMemoryError("CUDA out of memory")]
    world.run()

    ended = [ride for ride in rides if ride.rider.error is not None]
    assert len(ended) == 1
    assert all(ride.rider.result == ride.alone() for ride in rides if ride not in ended)
    assert world.engine.gone is None


@pytest.mark.parametrize("where", ["enter", "leave", "compute"])
def test_a_lost_device_ends_everybody(where: str) -> None:
    """All who ride, who wait for bytes and who come later end with DeviceGone; it is said once."""
    world, said = World(), []
    gates = transformer(world, 1.0)
    world.engine.on_gone = lambda: said.append(world.now)
    rides = [world.arrival(1.0, [(gates, 3)], 0.1) for _ in range(3)]
    missing = world.component("text_encoder", 1, 1)
    missing[0].ready = False
    rides.append(world.arrival(2.0, [(missing, 1)], 0.1))
    rides.append(world.arrival(100.0, [(gates, 3)], 0.1))
    if where == "compute":
        rides[1].fault = fault()
    else:
        (world.bus.faults if where == "enter" else world.bus.leave_faults)[gates[5]] = [fault()]
    world.run()

    assert [type(ride.rider.error) for ride in rides] == [DeviceGone] * 5
    assert len(said) == 1


def test_a_fault_as_the_baton_is_laid_down_reaches_who_waits_for_bytes() -> None:
    """The last gate is closed when nobody can go on; if that fails, riders that wait for bytes hear of it."""
    world = World()
    gates, missing = world.component("a", 1, 1), world.component("b", 1, 1)
    missing[0].ready = False
    rides = [world.arrival(1.0, [(missing, 1)], 0.1), world.arrival(2.0, [(gates, 1)], 0.1)]
    world.bus.leave_faults[gates[0]] = [fault()]
    world.run()

    assert isinstance(rides[0].rider.error, DeviceGone)
    assert rides[1].rider.result == rides[1].alone()


moments = st.integers(0, 60).map(lambda n: n / 2 + 0.25)
riders = st.fixed_dictionaries(
    {
        "when_s": moments,
        "models": st.sampled_from([0, 1]),
        "steps": st.integers(2, 4),
        "gate_s": st.sampled_from([0.05, 0.3, 1.0, 3.0]),
        "cancel_after_s": st.none() | moments,
    }
)


@settings(max_examples=60, deadline=None)
@given(
    riders=st.lists(riders, min_size=1, max_size=7),
    gate_bytes=st.tuples(*[st.sampled_from([0, 300, 2000])] * 4),
    late=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), moments), max_size=4),
    memory=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=2),
    lost=st.none() | st.tuples(st.integers(0, 3), st.integers(0, 2)),
)
@example(riders=[], gate_bytes=(0, 0, 0, 0), late=[], memory=[], lost=None)
def test_whatever_happens_every_rider_ends(
    riders: list[dict[str, Any]],
    gate_bytes: tuple[int, ...],
    late: list[tuple[int, int, float]],
    memory: list[tuple[int, int]],
    lost: tuple[int, int] | None,
) -> None:
    """Arrivals, sizes, cancels, late bytes, faults: results are as alone, errors have their reason, nobody is left."""
    world = World()
    names = ("encoder", "transformer", "encoder_2", "transformer_2")
    parts = [world.component(name, 3, size) for name, size in zip(names, gate_bytes, strict=True)]
    rides: list[Ride] = []
    for n, asked in enumerate(riders):
        encoder, denoiser = parts[2 * asked["models"] : 2 * asked["models"] + 2]
        plan = [(encoder, 1), (denoiser, asked["steps"]), (encoder[:1], 1)]
        rides.append(world.arrival(asked["when_s"], plan, asked["gate_s"], seed=n))
        if asked["cancel_after_s"] is not None:
            world.cancel(asked["when_s"] + asked["cancel_after_s"], rides[-1])
    for part, gate, when_s in late:
        world.ready(when_s, parts[part][gate])
    for part, gate in memory:
        world.bus.faults.setdefault(parts[part][gate], []).append(torch.OutOfMemoryError("CUDA out of memory"))
    if lost is not None:
        world.bus.faults.setdefault(parts[lost[0]][lost[1]], []).append(fault())
    world.run()

    for ride, asked in zip(rides, riders, strict=True):
        error = ride.rider.error
        if error is None:
            assert ride.rider.result == ride.alone()
        elif isinstance(error, Cancelled):
            assert asked["cancel_after_s"] is not None
        elif isinstance(error, DeviceGone):
            assert lost is not None
        else:
            assert isinstance(error, torch.OutOfMemoryError)
            assert memory
    assert sum(isinstance(r.rider.error, torch.OutOfMemoryError) for r in rides) <= len(memory)
    assert world.engine._sweeps.standing() == []
    assert world.bus.open is None
    assert world.engine._idle
    assert not world.engine._runnable
