"""What it costs to ask whether bytes may be read: an extent's state byte, and a gate's extents, as samplers ask.

    python bench/flag_check.py

Nanoseconds a call, the median of several rounds, with the loop around it. `gate_first` is a gate's first check, which
looks at each of its extents; `gate` every later one; `empty` a call of a function that does nothing, to compare with.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "gen")]

import torch
from torch import nn

from bench.common import Figures, pick_device, report, table
from services.params.arena import AttachedArena, attach
from services.params.header import Header
from services.params.layout import place
from services.params.owned_arena import OwnedArena
from services.params.specs import TensorSpec
from services.sampler.gates import BoundParam, Gate

LIMIT_NS = 1000
EXTENTS = 600  # a transformer of 40 GB
GATE_EXTENTS = 4
TENSOR_BYTES = 4096
NONE = "00" * 16


@contextmanager
def ready_arena() -> Iterator[AttachedArena]:
    """An arena of small extents, all READY."""
    specs = [TensorSpec(f"t.{n}", "U8", (TENSOR_BYTES,), 0, 0, TENSOR_BYTES) for n in range(EXTENTS)]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        owned = OwnedArena.create(Path(folder) / "m.arena", Header("m", NONE, NONE, NONE, place(specs, TENSOR_BYTES)))
        owned.reserve()
        for extent in range(EXTENTS):
            owned.publish(extent, bytes(16))
        with attach(owned.path, NONE) as arena:
            yield arena
        owned.close()


def gate_of(arena: AttachedArena, number: int) -> Gate:
    """A gate with the params of some extents that follow each other."""
    tensors = [arena.tensors[(number + n) % EXTENTS] for n in range(GATE_EXTENTS)]
    empty = torch.empty(0)
    params = tuple(BoundParam(empty, tensor.offset, tensor.size_bytes, empty) for tensor in tensors)
    return Gate(arena.component, f"gate {number}", nn.Identity(), arena, params)


def empty(extent: int) -> bool:
    return True


def ns_each(call: Callable[[int], object], count: int, rounds: int) -> float:
    """Nanoseconds of `call`, which is given extents in turn."""
    extents = [n % EXTENTS for n in range(count)]
    return statistics.median(_ns(call, extents) for _ in range(rounds))


def _ns(call: Callable[[int], object], extents: list[int]) -> float:
    start = time.perf_counter_ns()
    for extent in extents:
        call(extent)
    return (time.perf_counter_ns() - start) / len(extents)


def gate_ns(arena: AttachedArena, count: int) -> tuple[float, float]:
    """(the first check of a gate, each later one)."""
    gates = [gate_of(arena, number) for number in range(min(count, EXTENTS))]
    times = []
    for _ in range(2):
        start = time.perf_counter_ns()
        for gate in gates:
            gate.is_ready()
        times.append((time.perf_counter_ns() - start) / len(gates))
    return times[0], times[1]


def measure(count: int, rounds: int) -> Figures:
    with ready_arena() as arena:
        firsts, laters = zip(*(gate_ns(arena, count) for _ in range(rounds)), strict=True)
        figures = {
            "empty_ns": ns_each(empty, count, rounds),
            "extent_ns": ns_each(arena.is_ready, count, rounds),
            "gate_ns": statistics.median(laters),
            "gate_first_ns": statistics.median(firsts),
        }
    within = all(figures[key] <= LIMIT_NS for key in ("extent_ns", "gate_ns"))
    return {"calls": count, "gate_extents": GATE_EXTENTS} | figures | {"within_limit": within}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000, help="calls in a round")
    parser.add_argument("--tiny", action="store_true", help="a thousand calls, to try the code")
    options = parser.parse_args(arguments)
    figures = measure(1000 if options.tiny else options.count, 3 if options.tiny else 9)
    table("one check", ("", ""), list(figures.items()))
    report("flag_check", pick_device(), figures)


if __name__ == "__main__":
    main()
