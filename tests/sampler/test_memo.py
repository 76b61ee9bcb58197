"""Prompt embeddings are remembered, and nobody can spoil them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from concurrent.futures import Future
from threading import Event, Thread

import pytest
import torch

from services.sampler.budget import Budget
from services.sampler.drawing import Drawing
from services.sampler.memo import PromptMemo
from services.sampler.requests import ImageRequest, Phase
from services.sampler.riders import Rider
from services.sampler.ring import Ring
from services.sampler.work import WorkMemory
from services.sampler.workspace import Workspace
from tests.sampler.inprocess import attached
from tests.stack import Stack


def never(start: object) -> None:
    """Nobody else encodes."""
    raise AssertionError


def test_a_repeated_prompt_is_not_encoded_again() -> None:
    """Equal plain arguments give equal tensors from one call; results are copies."""
    calls: list[str] = []

    def encode(prompt: str, length: int = 8, device: torch.device | None = None) -> tuple[object, None]:
        calls.append(prompt)
        return [torch.full((2,), float(len(prompt)))], None

    remembered = PromptMemo().wrap(encode, never)
    first = remembered("fox", device=torch.device("cpu"))
    first[0][0].zero_()
    again = remembered("fox", device=torch.device("cpu"))
    remembered("fox", length=9, device=torch.device("cpu"))

    assert calls == ["fox", "fox"]
    assert torch.equal(again[0][0], torch.full((2,), 3.0))
    assert again[1] is None


def test_tensors_among_the_arguments_are_not_remembered() -> None:
    """A caller's own embeddings are no key."""
    calls: list[int] = []
    remembered = PromptMemo().wrap(lambda embeds: calls.append(1), never)
    remembered(torch.zeros(2))
    remembered(torch.zeros(2))

    assert len(calls) == 2


def test_the_least_recently_used_goes_first() -> None:
    """The memo is bounded by the bytes of what it remembers."""
    calls: list[str] = []

    def encode(prompt: str) -> list[torch.Tensor]:
        calls.append(prompt)
        return [torch.zeros(25)]

    memo = PromptMemo(limit_bytes=200)
    remembered = memo.wrap(encode, never)
    for prompt in ("a", "b", "a", "c", "a", "b"):
        remembered(prompt)

    assert calls == ["a", "b", "c", "b"]
    assert memo.size_bytes == 200


def test_equal_prompts_at_once_are_encoded_once() -> None:
    """Who comes while another rider encodes the same waits for it, and encodes by itself if that one failed."""
    memo, calls = PromptMemo(), list[str]()

    def encode(prompt: str) -> torch.Tensor:
        calls.append(prompt)
        if len(calls) == 1:  # another rider comes now, waits, and is told when this one has failed
            late = Thread(target=lambda: late_results.append(memo.wrap(encode, wait)(prompt)))
            late.start()
            came.wait(10)
            threads.append(late)
            raise ValueError("no luck")
        return torch.zeros(4)

    def wait(start: Callable[[Callable[[], None]], None]) -> None:
        told = Event()
        start(told.set)
        came.set()
        told.wait(10)

    came, threads, late_results = Event(), list[Thread](), list[object]()
    with pytest.raises(ValueError, match="no luck"):
        memo.wrap(encode, wait)("fox")
    threads[0].join(10)

    assert calls == ["fox", "fox"]
    assert memo.size_bytes == 16
    assert len(late_results) == 1


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_riders_with_one_prompt_share_its_encoding(stack: Stack) -> None:
    """Two pictures of a request ride at once; the text encoder's layers run for one of them."""
    with attached(stack, "tiny", Ring(torch.device("cpu"), Budget(1 << 40), keep_residents=False), 400_000) as model:
        passes: list[object] = []
        model.pipeline.text_encoder.layers[0].register_forward_hook(lambda *_: passes.append(None))
        request = model.traits.resolve(ImageRequest("tiny", "a red fox", "r", width_px=64, height_px=64, step_count=2))
        workspace = Workspace(model.engine, WorkMemory(0))
        ended: list[Future[None]] = [Future() for _ in range(3)]
        riders, phases = [], list[list[Phase]]()
        for index, end in enumerate(ended):
            phases.append([])
            emit = functools.partial(lambda seen, progress: seen.append(progress.phase), phases[-1])
            drawing = Drawing(model, workspace, request, index, emit, lambda step, image: None)
            done = functools.partial(lambda end, rider: end.set_result(None), end)
            riders.append(Rider(lambda _, drawing=drawing: drawing.draw(), done, drawing.passed, drawing.paused))
        # Somebody holds the baton until all three wait for it: else the first may be done before the last is there.
        engine, holds = model.engine, Event()

        def hold(rider: Rider) -> None:
            holds.set()
            until(lambda: len(engine._news) == 3)

        engine.ride(Rider(hold, lambda rider: None))
        assert holds.wait(20)
        for rider in riders:
            model.engine.ride(rider)
        for end in ended:
            end.result(60)

    assert [rider.error for rider in riders] == [None] * 3
    assert len(passes) == 1
    # Who waits says that its prompt is encoded, which is so.
    assert all(Phase.ENCODING in seen and seen.count(Phase.PREPARING) <= 1 for seen in phases)
