"""Requests to running samplers, alone and together, with what they took."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from headwater_client import Client, Image
from headwater_client.events import Finished

from bench.riding import GATE_LIMIT, TINY_GATE_LIMIT
from tests.stack import Process, Stack

TIMEOUT_S = 600


@dataclass(frozen=True)
class Job:
    """A request."""

    prompt: str
    width_px: int
    height_px: int
    step_count: int
    seed: int = 1
    count: int = 1
    model: str = "z"
    tiled_decode: bool | None = False  # the same work at every budget, and plain diffusers' pixels
    more: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 0.0})  # of the client's options

    def take(self, name: str) -> Job:
        """The same with a prompt of the same length in tokens that no sampler has seen: nothing is remembered of it."""
        return replace(self, prompt=f"{self.prompt}, take {name:>8}")


@dataclass(frozen=True)
class Answer:
    """What came back, and after how many seconds on the client's clock."""

    images: tuple[Image, ...]
    finished: Finished
    seconds: float

    @property
    def hashes(self) -> tuple[str, ...]:
        """SHA-256 of each picture's file: equal pixels in, equal bytes out."""
        return tuple(image.sha256 for image in self.images)


def ask(address: str, job: Job) -> Answer:
    """One request, to its end."""
    with Client(address) as client:
        start = time.perf_counter()
        result = client.generate(
            job.prompt, model=job.model, width=job.width_px, height=job.height_px, steps=job.step_count,
            seed=job.seed, count=job.count, timeout=TIMEOUT_S, tiled_decode=job.tiled_decode, **job.more,
        )  # fmt: skip
        return Answer(result.images, result.finished, time.perf_counter() - start)


def ask_together(addresses: Sequence[str], jobs: Sequence[Job]) -> tuple[list[Answer], float]:
    """All of `jobs` at once, dealt to `addresses` in turn; (answers, seconds until the last)."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        start = time.perf_counter()
        answers = list(pool.map(lambda n: ask(addresses[n % len(addresses)], jobs[n]), range(len(jobs))))
        return answers, time.perf_counter() - start


def start_sampler(stack: Stack, device: torch.device, tiny: bool, *flags: str) -> Process:
    """A sampler as an operator starts it; on a CPU one that copies params through slots, as for a GPU."""
    where = ("--device", "cuda") if device.type == "cuda" else ("--device", "cpu", "--test-ring")
    return stack.sampler(*where, *flags, gate_limit=TINY_GATE_LIMIT if tiny else GATE_LIMIT)


def prepare(address: str, model: str = "z") -> float:
    """Attach the model and wait until all of it is in the host's memory; seconds."""
    start = time.perf_counter()
    with Client(address) as client:
        for _ in client.prepare(model):
            pass
    return time.perf_counter() - start
