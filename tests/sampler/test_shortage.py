"""Memory that was short without anybody saying so: the picture is drawn again with more room, or refused."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
import torch
from PIL import Image

from services.errors import DeviceMemoryFull
from services.sampler.budget import Budget
from services.sampler.drawing import Drawing
from services.sampler.model import AttachedModel
from services.sampler.pixels import Pixels
from services.sampler.requests import ImageRequest
from services.sampler.riders import Rider
from services.sampler.ring import Ring
from services.sampler.work import WorkMemory
from services.sampler.workspace import Workspace
from tests.sampler.inprocess import attached
from tests.stack import Stack


class Tight(Workspace):
    """A device on which an allocation fails in every stretch that is watched, until residents have made way."""

    ways_made = 0
    relents = True
    seen = 0

    def failures(self) -> int:
        if not (self.relents and self.ways_made):
            self.seen += 1
        return self.seen

    def make_way(self) -> bool:
        self.ways_made += 1
        return super().make_way()


def drawn(model: AttachedModel, workspace: Workspace) -> Image.Image:
    request = model.traits.resolve(ImageRequest("tiny", "a red fox", "r", width_px=64, height_px=64, step_count=2))
    drawing = Drawing(model, workspace, request, 0, lambda progress: None, lambda step, image: None)
    ended: Future[None] = Future()
    rider = Rider(lambda _: drawing.draw(), lambda _: ended.set_result(None), drawing.passed, drawing.paused)
    model.engine.ride(rider)
    ended.result(60)
    if rider.error is not None:
        raise rider.error
    assert isinstance(rider.result, Pixels)
    return rider.result.image()


def test_a_picture_is_drawn_again_with_more_room(stack: Stack) -> None:
    with attached(stack, "tiny", Ring(torch.device("cpu"), Budget(1 << 40)), 400_000) as model:
        tight = Tight(model.engine, WorkMemory(0))
        found = drawn(model, tight)
        assert tight.ways_made == 1
        wanted = drawn(model, Workspace(model.engine, WorkMemory(0)))

    assert found.tobytes() == wanted.tobytes()


def test_a_picture_that_stays_short_is_refused(stack: Stack) -> None:
    """Other last bits are never handed out."""
    with attached(stack, "tiny", Ring(torch.device("cpu"), Budget(1 << 40)), 400_000) as model:
        tight = Tight(model.engine, WorkMemory(0))
        tight.relents = False
        with pytest.raises(DeviceMemoryFull, match="raise --max-vram"):
            drawn(model, tight)
    assert tight.ways_made == 1
