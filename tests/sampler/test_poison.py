"""The test engine shows a read of params outside their gate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from services.sampler.budget import Budget
from services.sampler.drawing import Drawing
from services.sampler.model import AttachedModel
from services.sampler.requests import ImageRequest
from services.sampler.ring import Ring
from services.sampler.work import WorkMemory
from services.sampler.workspace import Workspace
from tests.sampler.inprocess import attached, under_baton
from tests.sampler.support import pixels, plain_picture
from tests.stack import Stack

REQUEST = ImageRequest("z_image", "a red fox", "r", width_px=64, height_px=64, step_count=3, seed=5, count=1)


@pytest.fixture(params=[True, False], ids=["poisoned slots", "unbound params"])
def model(request: pytest.FixtureRequest, stack: Stack) -> Iterator[AttachedModel]:
    """Z-Image in this process, streamed through a ring of slots on the CPU."""
    ring = Ring(torch.device("cpu"), Budget(1 << 40), keep_residents=False, poison=request.param)
    with attached(stack, "z_image", ring) as model:
        yield model


def draw(model: AttachedModel) -> NDArray[np.uint8]:
    resolved = model.traits.resolve(REQUEST)
    workspace = Workspace(model.engine, WorkMemory(0))
    drawing = Drawing(model, workspace, resolved, 0, lambda progress: None, lambda step, image: None)
    picture = under_baton(model.engine, drawing.draw).image()
    return pixels(picture)


def reference(tiny_folders: dict[str, Path]) -> NDArray[np.uint8]:
    return pixels(plain_picture(tiny_folders["z_image"], "a red fox", (64, 64), 3, 5, call={}))


def test_clean_model_draws_right(model: AttachedModel, tiny_folders: dict[str, Path]) -> None:
    """Without a plant the ring draws what diffusers draws: no code of ours or theirs reads outside a gate."""
    assert np.array_equal(draw(model), reference(tiny_folders))


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize(("reader", "owner"), [(0, 3), (3, 0)], ids=["before its gate", "after its gate"])
def test_planted_read_is_caught(model: AttachedModel, tiny_folders: dict[str, Path], reader: int, owner: int) -> None:
    """A layer that reads another's weight, a read that no gate covers, ruins the picture."""
    layers = model.pipeline.transformer.layers
    stolen = layers[owner].attention.to_q.weight

    def plant(module: object, args: object, output: torch.Tensor) -> torch.Tensor:
        return output + 0.0 * stolen.sum()

    layers[reader].register_forward_hook(plant)
    picture = draw(model)

    assert not np.array_equal(picture, reference(tiny_folders))
    assert picture.std() == 0  # NaN everywhere
