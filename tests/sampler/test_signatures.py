"""Layouts as values: told apart where a program would be another, and made anew from JSON."""

from __future__ import annotations

import json

import pytest
import torch

from services.sampler.signatures import aligned, build, is_portable, signature

X = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    "value",
    [
        X,
        X.transpose(0, 1),
        X[:1].expand(5, 3, 4),
        X.to(torch.bfloat16),
        (X, [X.bool(), None], {"scale": 1.5, "flag": True, "name": "a", "nothing": {}}),
        torch.tensor(3.0),
    ],
)
def test_a_layout_is_made_anew(value: object) -> None:
    """What is built from a layout that went through JSON has that layout."""
    layout = signature(value)

    assert is_portable(layout)
    assert signature(build(json.loads(json.dumps(layout)))) == layout


def test_inference_tensors_are_of_their_own_kind() -> None:
    """A compiled program tells them apart, and so does a layout."""
    with torch.inference_mode():
        inside = torch.ones(2, 3, 4)

    assert signature(inside) != signature(X)
    assert build(signature(inside)).is_inference()


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, True), (1, 1.0), (X, X.double()), (X, X.transpose(0, 1)), ((X,), [X]), ({"a": X}, {"b": X}), (None, 0)],
)
def test_other_programs_have_other_layouts(one: object, other: object) -> None:
    """Equal keys must mean equal programs."""
    assert signature(one) != signature(other)


def test_what_cannot_be_made_anew_is_known() -> None:
    """An object of another kind has a layout, but no other process could build it."""
    assert not is_portable(signature((X, {"kernel": object()})))


def test_odd_addresses_are_copied() -> None:
    """A tensor that starts at an odd address is replaced by an equal one that does not; others stay as they are."""
    odd = torch.arange(9.0)[1:]
    moved, same = aligned((odd, [X]))

    assert moved.data_ptr() % 16 == 0
    assert torch.equal(moved, odd)
    assert same[0] is X
