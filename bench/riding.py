"""The real engine in this process, over a real loader's arenas, ridden by calls of the denoiser with fixed inputs."""

from __future__ import annotations

import functools
import gc
import shutil
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from bench import checkpoint
from bench.common import seconds
from services.sampler import compiling
from services.sampler.blocks import Speedup
from services.sampler.budget import Budget
from services.sampler.compiler import Compiler
from services.sampler.driver import Driver
from services.sampler.engine import Engine
from services.sampler.graphs import Graphs
from services.sampler.helper import Helper
from services.sampler.meter import timing_event
from services.sampler.model import AttachedModel
from services.sampler.recorder import CudaRecorder
from services.sampler.registration import Registrar
from services.sampler.residency import SLOT_COUNTS, plan_slots, resident_bytes, scratch_bytes
from services.sampler.riders import Rider
from services.sampler.ring import Ring
from tests.sampler.inprocess import attached, under_baton
from tests.stack import Stack

T = TypeVar("T")
UNLIMITED = 1 << 50
LEAST_STEPS = 4  # of which one is measured
GATE_LIMIT, TINY_GATE_LIMIT = 512 << 20, 600_000  # a gate for each block, in both
Mark = Any  # a CUDA event, or seconds


def denoiser_only(folder: Path, target: Path) -> Path:
    """A Z-Image folder that links denoiser and autoencoder of `folder`; its text encoder is tiny and never called."""
    list(checkpoint.write("z-image", target, tiny=True))
    for name in ("transformer", "vae"):
        shutil.rmtree(target / name)
        (target / name).symlink_to(folder.resolve() / name)
    return target


@dataclass(frozen=True)
class Call:
    """What one request hands to Z-Image's transformer at a step."""

    latents: torch.Tensor
    time: torch.Tensor
    caption: torch.Tensor

    @classmethod
    def of(cls, seed: int, size_px: tuple[int, int], transformer: Any, device: torch.device) -> Call:
        """Seeded inputs of a picture of `size_px` (width, height) with a prompt of 60 tokens."""
        config = transformer.config
        generator = torch.Generator().manual_seed(seed)
        width, height = size_px

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, torch.bfloat16)

        time_ = torch.full((1,), 0.5, device=device)
        return cls(noise(config.in_channels, 1, height // 8, width // 8), time_, noise(60, config.cap_feat_dim))


def forward(transformer: Any, calls: Sequence[Call]) -> list[torch.Tensor]:
    """One forward of the transformer for all of `calls` as one batch."""
    times = torch.cat([c.time for c in calls])
    output: list[torch.Tensor] = transformer(
        [c.latents for c in calls], times, [c.caption for c in calls], return_dict=False
    )[0]
    return list(output)


def mark(device: torch.device) -> Mark:
    """This moment on the device's own clock; the host does not wait."""
    if device.type != "cuda":
        return time.perf_counter()
    event = timing_event()
    event.record()
    return event


def between_ms(start: Mark, end: Mark) -> float:
    """Milliseconds from one mark to another; the device has passed both."""
    return (end - start) * 1e3 if isinstance(start, float) else float(start.elapsed_time(end))


@dataclass
class Ride:
    """What a few steps that all riders made together showed.

    Times and bytes leave out the first two steps and the last, after which nothing is brought ahead.
    """

    step_ms: float = float("inf")  # in which each rider made one step
    wall_ms: float = float("inf")  # the same from the host's clock over all steps, start and end included
    streamed_bytes: int = 0  # in such a step, as the transfer counted them
    outputs: list[list[torch.Tensor]] = field(default_factory=list)  # by rider, by step

    def equals(self, references: Sequence[torch.Tensor]) -> bool:
        """Whether every output of every step has the bits of its rider's reference."""
        pairs = zip(self.outputs, references, strict=True)
        return all(outputs and all(torch.equal(o, reference) for o in outputs) for outputs, reference in pairs)


@dataclass
class Log:
    """When each rider's step ended, whoever's it was, and what had been streamed by then."""

    device: torch.device
    marks: list[Mark] = field(default_factory=list)
    streamed: list[int] = field(default_factory=list)

    def step_ended(self, streamed_bytes: int = 0) -> None:
        self.marks.append(mark(self.device))
        self.streamed.append(streamed_bytes)

    def summary(self, riders: int, wall_s: float) -> Ride:
        """Once the device is idle. It does not matter in which order the riders made their steps."""
        step_count = len(self.marks) // riders
        first, last = 2 * riders - 1, (step_count - 1) * riders - 1
        measured = step_count - 3
        return Ride(
            between_ms(self.marks[first], self.marks[last]) / measured,
            wall_s * 1e3 / step_count,
            (self.streamed[last] - self.streamed[first]) // measured,
        )


def ride(model: AttachedModel, calls: Sequence[Call], step_count: int, runs: int = 2) -> Ride:
    """`step_count` steps of one rider for each call, all at once; times are the best of `runs` after a short one."""
    device = model.engine.transfer.device
    found = []
    for run in range(runs + 1):
        log, outputs = Log(device), [list[torch.Tensor]() for _ in calls]
        count = step_count if run else LEAST_STEPS
        wall_s = seconds(lambda n=count, log=log, o=outputs: ride_once(model, calls, n, log, o), device)  # type: ignore[misc]
        found.append(log.summary(len(calls), wall_s))
        found[-1].outputs = outputs
    return min(found[1:], key=lambda each: each.step_ms)


def ride_once(
    model: AttachedModel, calls: Sequence[Call], step_count: int, log: Log, outputs: list[list[torch.Tensor]]
) -> None:
    """One run. Raises what a rider raised."""

    def work(number: int) -> None:
        with torch.inference_mode():
            model.bring_pinned()
            for _ in range(step_count):
                outputs[number] += forward(model.pipeline.transformer, [calls[number]])
                log.step_ended(model.engine.transfer.streamed_bytes)

    passages = [
        Passage(functools.partial(work, n), call.latents.shape, lambda done=outputs[n]: step_count - len(done))  # type: ignore[misc]
        for n, call in enumerate(calls)
    ]
    all_at_once(model, passages)


@dataclass(frozen=True)
class Passage(Generic[T]):
    """Work for one rider, with what the engine may know of it: riders of one kind take the same time a step."""

    work: Callable[[], T]
    kind: Hashable
    steps_left: Callable[[], int]


def all_at_once(model: AttachedModel, passages: Sequence[Passage[T]]) -> list[T]:
    """Run each passage as a rider of its own, all at once; their values. Raises what one of them raised."""
    ended: list[Future[None]] = [Future() for _ in passages]
    riders = [
        Rider(
            lambda rider, p=p: p.work(),  # type: ignore[misc]
            lambda rider, end=end: end.set_result(None),  # type: ignore[misc]
            kind=p.kind,
            steps_left=p.steps_left,
        )
        for p, end in zip(passages, ended, strict=True)
    ]
    for rider in riders:
        model.engine.ride(rider)
    for rider, end in zip(riders, ended, strict=True):
        end.result(300)
        if rider.error is not None:
            raise rider.error
    return [rider.result for rider in riders]  # type: ignore[misc]


def new_ring(device: torch.device, budget_bytes: int | None = UNLIMITED, kind: type[Ring] = Ring) -> Ring:
    """The transfer under a budget for params; None: nothing stays on the device."""
    registrar = Registrar(device, Driver()) if device.type == "cuda" else None
    return kind(device, Budget(budget_bytes or UNLIMITED), keep_residents=budget_bytes is not None, registrar=registrar)


@dataclass(frozen=True)
class Arithmetic:
    """How blocks are computed: as the sampler's flags of the same names say."""

    cuda_graphs: bool = True
    compile_cache: Path | None = None  # None: eager

    @property
    def flags(self) -> tuple[str, ...]:
        graphs = () if self.cuda_graphs else ("--no-cuda-graphs",)
        return (
            (*graphs, "--numerics", "compiled", "--compile-cache", str(self.compile_cache))
            if self.compile_cache
            else graphs
        )

    @contextmanager
    def speedups(self, device: torch.device) -> Iterator[Callable[[Engine], Sequence[Speedup]]]:
        """For an engine in this process."""
        with ExitStack() as open_now:

            def make(engine: Engine) -> Sequence[Speedup]:
                made: list[Speedup] = []
                if self.compile_cache is not None:
                    compiling.use_cache(self.compile_cache)
                    made.append(open_now.enter_context(closing(Compiler(engine, Helper(self.compile_cache)))))
                if self.cuda_graphs and device.type == "cuda":
                    made.append(Graphs(device, CudaRecorder(device)))
                return made

            yield make


@contextmanager
def attached_to(
    stack: Stack, name: str, ring: Ring, tiny: bool, arithmetic: Arithmetic = Arithmetic()
) -> Iterator[AttachedModel]:
    """The model on a ring, its arenas page-locked; all memory is given back at the end."""
    limit = TINY_GATE_LIMIT if tiny else GATE_LIMIT
    try:
        with (
            arithmetic.speedups(ring.device) as speedups,
            attached(stack, name, ring, limit, speedups) as model,
        ):
            while not ring.is_registered():  # then copies run at the bus's speed
                time.sleep(0.01)
            yield model
            under_baton(model.engine, model.detach)
            del model
    finally:
        gc.collect()
        if ring.device.type == "cuda":
            torch.cuda.empty_cache()


def budget_for(model: AttachedModel, share: float) -> int:
    """The budget that keeps `share` of the denoiser's bytes on the device, beside slots and what is always there."""
    streamed = [gate for gate in model.gates if not gate.pinned and not gate.host]
    slots = sum(each.size_bytes for each in plan_slots(streamed, max(SLOT_COUNTS))) + scratch_bytes(streamed)
    pinned = resident_bytes(gate for gate in model.gates if gate.pinned)
    denoiser = sum(gate.size_bytes for gate in streamed if gate.component in checkpoint.DENOISERS)
    return pinned + slots + round(share * denoiser)


def step_bytes(model: AttachedModel) -> int:
    """Bytes that a step of the denoiser must bring over the bus: what is not resident, once."""
    return sum(model.engine.transfer.streamed_bytes_of(gate) for gate in model.gates_of("transformer"))


def resident_share(model: AttachedModel) -> float:
    """Part of the denoiser's bytes that stays on the device."""
    gates = [gate for gate in model.gates_of("transformer") if not gate.pinned]
    stays = sum(model.engine.transfer.resident_bytes_of(gate) for gate in gates)
    return stays / sum(gate.size_bytes for gate in gates)
