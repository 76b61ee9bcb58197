"""Ways to choose whom a sweep carries, on the same arrivals in virtual time: docs/decisions/0007.

Runs the real engine with a bus and a clock that are numbers (tests/sampler/world.py). No GPU, no pixels.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "gen")]

from services.sampler import sweeps
from tests.sampler.world import BYTES_PER_S, World

Choose = Callable[..., list[int]]
GATES, RIDERS, SEEDS = 8, 12, 6
# Seconds: to bring a gate, to compute one (half, once or twice that), between arrivals.
CASES = [(1, 0.15, 30), (1, 0.4, 60), (1, 0.8, 60), (1, 1.5, 100), (0.02, 1, 80)]
BURSTS = [4, 8]  # riders that come at once, with the second case's seconds


def all_ride(costs_s: Sequence[float], bus_s: float, load_s: float = 0.0, carried_count: int = 0) -> list[int]:
    return list(range(len(costs_s)))


def only_who_fits(costs_s: Sequence[float], bus_s: float, load_s: float = 0.0, carried_count: int = 0) -> list[int]:
    chosen: list[int] = []
    for index, cost_s in enumerate(costs_s):
        if not carried_count + len(chosen) or load_s + cost_s <= bus_s:
            chosen.append(index)
            load_s += cost_s
    return chosen


def sum_of_completions(
    costs_s: Sequence[float], bus_s: float, load_s: float = 0.0, carried_count: int = 0
) -> list[int]:
    """Take on who delays those carried less than a pass of its own would delay itself and those behind it."""
    chosen: list[int] = []
    for index, cost_s in enumerate(costs_s):
        carried, behind = carried_count + len(chosen), len(costs_s) - index - 1
        extra = max(0.0, load_s + cost_s - bus_s)
        if not carried or (load_s < bus_s and (1 + behind) * (max(bus_s, cost_s) - extra) >= carried * extra):
            chosen.append(index)
            load_s += cost_s
    return chosen


def burst(choose: Choose, count: int, gate_bus_s: float, gate_s: float) -> tuple[float, float]:
    """The same for `count` equal riders that come at once, their cost known."""
    sweeps.choose = choose
    world = World()
    denoiser = world.component("transformer", GATES, round(gate_bus_s * BYTES_PER_S))
    world.arrival(0.0, [(denoiser, 2)], gate_s)
    world.run()
    world.rides.clear()
    start_s = world.now = 1000.0
    rides = [world.arrival(start_s, [(denoiser, 9)], gate_s) for _ in range(count)]
    world.run()
    return mean(ride.took_s for ride in rides), max(ride.ended_s for ride in rides) - start_s


def run(choose: Choose, gate_bus_s: float, gate_s: float, gap_s: float, seed: int) -> tuple[float, float]:
    """(mean time of a request, time until all are done), seconds."""
    sweeps.choose = choose
    world, rng = World(), random.Random(seed)
    denoiser = world.component("transformer", GATES, round(gate_bus_s * BYTES_PER_S))
    encoder = world.component("text_encoder", 2, round(gate_bus_s * BYTES_PER_S))
    when_s = 0.0
    for number in range(RIDERS):
        when_s += rng.expovariate(1 / gap_s)
        cost_s = gate_s * rng.choice([0.5, 1, 2])
        world.arrival(when_s, [(encoder, 1), (denoiser, rng.choice([4, 9, 20]))], cost_s, seed=number)
    world.run()
    assert all(ride.rider.result == ride.alone() for ride in world.rides)
    return mean(ride.took_s for ride in world.rides), max(ride.ended_s for ride in world.rides)


def main() -> None:
    policies = (all_ride, only_who_fits, sum_of_completions, sweeps.choose)
    print("bus, compute a gate   all ride        only who fits   completions     this rule   (mean / all done, s)")
    for gate_bus_s, gate_s, gap_s in CASES:
        rows = [[run(policy, gate_bus_s, gate_s, gap_s, seed) for seed in range(SEEDS)] for policy in policies]
        show(f"{gate_bus_s:6} {gate_s:6}     ", [(mean(t for t, _ in row), mean(t for _, t in row)) for row in rows])
    for count in BURSTS:
        gate_bus_s, gate_s, _ = CASES[1]
        show(f"{count} at once          ", [burst(policy, count, gate_bus_s, gate_s) for policy in policies])


def show(head: str, times: Sequence[tuple[float, float]]) -> None:
    print(head + "".join(f"{mean_s:8.0f} /{all_s:6.0f}" for mean_s, all_s in times))


if __name__ == "__main__":
    main()
