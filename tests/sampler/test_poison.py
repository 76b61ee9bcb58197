"""The test engine shows a read of params outside their gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from services.params.arena import attach
from services.sampler.binding import build_pipeline
from services.sampler.drawing import Drawing
from services.sampler.engine import Engine
from services.sampler.model import AttachedModel
from services.sampler.requests import ImageRequest
from services.sampler.riders import Rider
from services.sampler.traits import traits_of
from services.sampler.transfer import Ring
from tests.sampler.support import pixels, plain_picture
from tests.stack import Stack

REQUEST = ImageRequest("z_image", "a red fox", "r", width_px=64, height_px=64, step_count=3, seed=5, count=1)


def under_baton(engine: Engine, work: Callable[[Rider], object]) -> object:
    """Run `work` as a rider and return its value."""
    done: Future[None] = Future()
    rider = Rider(work, lambda rider: done.set_result(None))
    engine.ride(rider)
    done.result(60)
    if rider.error is not None:
        raise rider.error
    return rider.result


@pytest.fixture(params=[True, False], ids=["poisoned slots", "unbound params"])
def model(request: pytest.FixtureRequest, stack: Stack) -> Iterator[AttachedModel]:
    """Z-Image in this process, streamed through a ring of slots on the CPU."""
    import asyncio

    from services.rpc.loader_client import LoaderClient

    async def prepared() -> object:
        async with LoaderClient(stack.loader_address) as client:
            return [news async for news in client.prepare("z_image")][-1].model

    known = asyncio.run(prepared())
    engine = Engine(Ring(torch.device("cpu"), 1 << 40, keep_residents=False, poison=request.param))
    with ExitStack() as leases:
        arenas = {
            c.name: leases.enter_context(attach(stack.arena_dir / c.arena, c.generation)) for c in known.components
        }
        config = stack.arena_dir / known.config

        def build(rider: Rider) -> AttachedModel:
            pipeline, components = build_pipeline(config, arenas)
            return AttachedModel("z_image", pipeline, components, engine, traits_of(pipeline, config), 8192)

        built = under_baton(engine, build)
        assert isinstance(built, AttachedModel)
        yield built


def draw(model: AttachedModel) -> NDArray[np.uint8]:
    resolved = model.traits.resolve(REQUEST)
    drawing = Drawing(model, resolved, 0, lambda progress: None, lambda step, image: None)
    picture = under_baton(model.engine, lambda rider: drawing.draw())
    return pixels(picture)


def reference(tiny_folders: dict[str, Path]) -> NDArray[np.uint8]:
    return pixels(plain_picture(tiny_folders["z_image"], "a red fox", (64, 64), 3, 5, call={}))


def test_clean_model_draws_right(model: AttachedModel, tiny_folders: dict[str, Path]) -> None:
    """Without a plant the ring draws what diffusers draws: no code of ours or theirs reads outside a gate."""
    assert np.array_equal(draw(model), reference(tiny_folders))


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_planted_read_is_caught(model: AttachedModel, tiny_folders: dict[str, Path]) -> None:
    """A layer that reads its neighbour's weight, a read that no gate covers, ruins the picture."""
    layers = model.pipeline.transformer.layers
    stolen = layers[3].attention.to_q.weight

    def plant(module: object, args: object, output: torch.Tensor) -> torch.Tensor:
        return output + 0.0 * stolen.sum()

    layers[0].register_forward_hook(plant)
    picture = draw(model)

    assert not np.array_equal(picture, reference(tiny_folders))
    assert picture.std() == 0  # NaN everywhere
