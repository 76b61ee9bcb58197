"""Markers of jobs that are done: for whom they count."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.sampler import compiling
from services.sampler.job import MARKERS, Job
from services.sampler.signatures import signature

JOB = Job(
    config="/models/z/transformer",
    class_module="diffusers",
    class_name="ZImageTransformer2DModel",
    block="layers.0",
    kind="k",
    tensors={"weight": signature(torch.ones(2, 3))},
    args=signature((torch.ones(2, 3), 1.5)),
    kwargs=signature({"mask": None}),
    device="cpu",
    thread_count=2,
)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A folder in which the helper process, which got the job as JSON, has marked it."""
    Job(**json.loads(JOB.to_json())).mark_done(tmp_path)
    return tmp_path


def test_a_marker_counts_for_the_kind_of_block(cache: Path) -> None:
    """Whichever block of the kind it is, of whichever model."""
    assert JOB.is_done(cache)
    assert replace(JOB, config="/models/other/transformer", block="layers.1").is_done(cache)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "other"},
        {"args": signature((torch.ones(2, 4), 1.5))},
        {"args": signature((torch.ones(2, 3), 2))},
        {"kwargs": signature({"mask": True})},
        {"thread_count": 3},
    ],
)
def test_other_programs_are_not_done(cache: Path, change: dict[str, object]) -> None:
    assert not replace(JOB, **change).is_done(cache)  # type: ignore[arg-type]


def test_other_software_has_not_done_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0.0")
        assert not JOB.is_done(cache)
    with monkeypatch.context() as patch:
        patch.setitem(compiling.INDUCTOR, "deterministic", False)
        assert not JOB.is_done(cache)


def test_a_folder_that_takes_no_marker_fails_nothing(tmp_path: Path) -> None:
    (tmp_path / MARKERS).touch()
    JOB.mark_done(tmp_path)

    assert not JOB.is_done(tmp_path)
