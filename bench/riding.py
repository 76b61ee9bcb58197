"""The real engine in this process, over a real loader's arenas, ridden by calls of the denoiser with fixed inputs."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import checkpoint
from bench.common import synchronize
from services.sampler.driver import Driver
from services.sampler.model import AttachedModel
from services.sampler.registration import Registrar
from services.sampler.residency import SLOT_COUNTS, plan_slots
from services.sampler.riders import Rider
from services.sampler.transfer import Ring
from tests.sampler.inprocess import attached, under_baton
from tests.stack import Stack

UNLIMITED = 1 << 50
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
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between_ms(start: Mark, end: Mark) -> float:
    """Milliseconds from one mark to another; the device has passed both."""
    return (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end)


@dataclass
class Ride:
    """What a few steps that all riders made together showed."""

    step_ms: float = float("inf")  # of a shared step, without the first two
    wall_ms: float = float("inf")  # the same from the host's clock over all steps, start and end included
    streamed_bytes: int = 0  # a middle step, as the transfer counted them
    outputs: list[list[torch.Tensor]] = field(default_factory=list)  # by rider, by step

    def equals(self, references: Sequence[torch.Tensor]) -> bool:
        """Whether every output of every step has the bits of its rider's reference."""
        pairs = zip(self.outputs, references, strict=True)
        return all(torch.equal(output, reference) for outputs, reference in pairs for output in outputs)


def steps_of(work: Any, step_count: int, device: torch.device) -> tuple[float, float]:
    """(ms of a middle step, ms of a step by the host's clock) of `work(marks)`; it appends a mark after each step."""
    marks: list[Mark] = []
    synchronize(device)
    start = time.perf_counter()
    work(marks)
    synchronize(device)
    wall_ms = (time.perf_counter() - start) * 1e3 / step_count
    return between_ms(marks[1], marks[-1]) / (len(marks) - 2), wall_ms


def ride(model: AttachedModel, calls: Sequence[Call], step_count: int, runs: int = 2) -> Ride:
    """`step_count` steps of one rider for each call, all at once; times are the best of `runs` after a short one."""
    best, device = Ride(), model.engine.transfer.device
    for run in range(runs + 1):
        count = step_count if run else min(3, step_count)
        result = Ride(outputs=[[] for _ in calls])
        counts: list[int] = []
        result.step_ms, result.wall_ms = steps_of(
            lambda marks, r=result, c=counts, n=count: ride_once(model, calls, n, r, marks, c), count, device
        )
        result.streamed_bytes = (counts[-1] - counts[1]) // (count - 2)
        if run and result.step_ms < best.step_ms:
            best = result
    return best


def ride_once(
    model: AttachedModel, calls: Sequence[Call], step_count: int, result: Ride, marks: list[Mark], counts: list[int]
) -> None:
    """One run; the first rider marks the end of each of its steps, and what was streamed by then."""
    transfer = model.engine.transfer

    def work(number: int) -> None:
        with torch.inference_mode():
            model.bring_pinned()
            for _ in range(step_count):
                result.outputs[number] += forward(model.pipeline.transformer, [calls[number]])
                if number == 0:
                    marks.append(mark(transfer.device))
                    counts.append(transfer.streamed_bytes)

    ended: list[Future[None]] = [Future() for _ in calls]
    riders = [
        Rider(lambda rider, number=number: work(number), lambda rider, end=end: end.set_result(None))  # type: ignore[misc]
        for number, end in enumerate(ended)
    ]
    for rider in riders:
        model.engine.ride(rider)
    for rider, end in zip(riders, ended, strict=True):
        end.result(300)
        if rider.error is not None:
            raise rider.error


def new_ring(device: torch.device, budget_bytes: int | None = UNLIMITED, kind: type[Ring] = Ring) -> Ring:
    """The transfer under a budget for params; None: nothing stays on the device."""
    registrar = Registrar(device, Driver()) if device.type == "cuda" else None
    return kind(device, budget_bytes or UNLIMITED, keep_residents=budget_bytes is not None, registrar=registrar)


@contextmanager
def attached_to(stack: Stack, name: str, ring: Ring, tiny: bool) -> Iterator[AttachedModel]:
    """The model on a ring, its arenas page-locked; all memory is given back at the end."""
    try:
        with attached(stack, name, ring, TINY_GATE_LIMIT if tiny else GATE_LIMIT) as model:
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
    slots = sum(each.size_bytes for each in plan_slots(streamed, max(SLOT_COUNTS)))
    pinned = sum(gate.size_bytes for gate in model.gates if gate.pinned)
    denoiser = sum(gate.size_bytes for gate in streamed if gate.component == "transformer")
    return pinned + slots + round(share * denoiser)


def step_bytes(model: AttachedModel) -> int:
    """Bytes that a step of the denoiser must bring over the bus: what is not resident, once."""
    return sum(model.engine.transfer.streamed_bytes_of(gate) for gate in model.gates_of("transformer"))


def resident_share(model: AttachedModel) -> float:
    """Part of the denoiser's bytes that stays on the device."""
    gates = [gate for gate in model.gates_of("transformer") if not gate.pinned]
    stays = sum(model.engine.transfer.resident_bytes_of(gate) for gate in gates)
    return stays / sum(gate.size_bytes for gate in gates)
