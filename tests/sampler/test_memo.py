"""Prompt embeddings are remembered, and nobody can spoil them."""

from __future__ import annotations

import torch

from services.sampler.memo import PromptMemo


def test_a_repeated_prompt_is_not_encoded_again() -> None:
    """Equal plain arguments give equal tensors from one call; results are copies."""
    calls: list[str] = []

    def encode(prompt: str, length: int = 8, device: torch.device | None = None) -> tuple[object, None]:
        calls.append(prompt)
        return [torch.full((2,), float(len(prompt)))], None

    remembered = PromptMemo().wrap(encode)
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
    remembered = PromptMemo().wrap(lambda embeds: calls.append(1))
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
    remembered = memo.wrap(encode)
    for prompt in ("a", "b", "a", "c", "a", "b"):
        remembered(prompt)

    assert calls == ["a", "b", "c", "b"]
    assert memo.size_bytes == 200


def test_a_prompt_encoded_twice_at_once_counts_once() -> None:
    """Two riders with one prompt that is not remembered yet both encode it."""
    memo = PromptMemo()

    def encode(depth: int) -> torch.Tensor:
        if depth == 0 and not memo.size_bytes:
            memo.wrap(lambda again: torch.zeros(4))(depth)  # the other rider, in the middle of this one's call
        return torch.zeros(4)

    memo.wrap(encode)(0)

    assert memo.size_bytes == 16
