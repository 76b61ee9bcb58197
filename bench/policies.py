"""Three ways to choose whom a sweep carries, on the same arrivals in virtual time: docs/decisions/0007.

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


def all_ride(costs_s: Sequence[float], bus_s: float, load_s: float = 0.0, carried_count: int = 0) -> list[int]:
    return list(range(len(costs_s)))


def only_who_fits(costs_s: Sequence[float], bus_s: float, load_s: float = 0.0, carried_count: int = 0) -> list[int]:
    chosen: list[int] = []
    for index, cost_s in enumerate(costs_s):
        if not carried_count + len(chosen) or load_s + cost_s <= bus_s:
            chosen.append(index)
            load_s += cost_s
    return chosen


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
    ours = sweeps.choose
    print("bus, compute a gate    all ride          only who fits     this rule         (mean / until all are done, s)")
    for gate_bus_s, gate_s, gap_s in CASES:
        line = f"{gate_bus_s:6} {gate_s:6}      "
        for choose in (all_ride, only_who_fits, ours):
            took = [run(choose, gate_bus_s, gate_s, gap_s, seed) for seed in range(SEEDS)]
            line += f"{mean(t for t, _ in took):8.0f} /{mean(t for _, t in took):6.0f}  "
        print(line)


if __name__ == "__main__":
    main()
