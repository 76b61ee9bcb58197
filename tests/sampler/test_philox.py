"""Noise of a CUDA device, computed on the host: published vectors, a device's own numbers, pictures drawn from it."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from headwater_client import Client

from services.errors import InvalidRequest
from services.sampler import drawing
from services.sampler.drawing import Drawing
from services.sampler.philox import PhiloxGenerator, PhiloxNoise, box_muller, normals, philox4x32, philox_generator
from services.sampler.requests import ImageRequest, Rng
from services.sampler.transfer import ArenaViews
from services.sampler.work import WorkMemory
from services.sampler.workspace import Workspace
from tests.sampler.inprocess import attached, under_baton
from tests.sampler.support import pixels, plain_picture, plain_pipeline, served
from tests.stack import Stack
from tests.tiny_models import CALLS

WITHIN = 5e-6
SEED = 2**63 - 1


@pytest.mark.parametrize(
    ("counter", "key", "block"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter: str, key: str, block: str) -> None:
    """Those of Random123, tests/kat_vectors, philox4x32 with 10 rounds; also beside other counters."""
    words = [int(word, 16) for word in counter.split()]
    counters = np.array([[0, 7, word] for word in words], np.uint32)
    first, second = (int(word, 16) for word in key.split())

    blocks = philox4x32(counters, (first, second))
    assert [f"{word:08x}" for word in blocks[:, 2]] == block.split()


def test_the_farthest_numbers_are_finite() -> None:
    """Words at the ends of their range: a uniform is never 0, and rounded to 1 it gives 0."""
    words = np.array([[0, 0, 2**32 - 1], [2**30, 3 * 2**30, 2**30]], np.uint32)
    farthest = np.sqrt(2 * 33 * np.log(2))

    assert np.abs(box_muller(words) - [farthest, -farthest, 0]).max() < WITHIN


# torch.randn on an H200 with torch 2.11: a generator with the seed drew (3, 4), (1, 4, 64, 64), (5,), (1, 16, 96, 96)
# in this order. Here are seed, draw, size, and elements 0, 1 and the last two.
DEVICE = [
    (0, 0, 12, [-0.9246624, -0.4253442, -1.6710504, 2.2655048]),
    (0, 1, 16384, [0.1808258, -0.5522628, -0.1173741, -1.4443588]),
    (0, 2, 5, [2.5440972, -0.7163489, 0.1267105, 0.1013566]),
    (42, 0, 12, [0.1940188, 2.1613736, -1.6621263, -0.3033137]),
    (42, 3, 147456, [-0.6973659, -1.8688258, -0.6525136, 0.9630853]),
    (SEED, 0, 12, [-0.8442149, 1.7427461, 1.2780347, -1.4582172]),
    (SEED, 3, 147456, [-0.4116103, 1.4260284, -0.2437953, 1.6088872]),
]


@pytest.mark.parametrize(("seed", "draw", "count", "want"), DEVICE)
def test_numbers_are_a_devices(seed: int, draw: int, count: int, want: list[float]) -> None:
    """Those of seed 0 are also in the documentation of a web UI (AUTOMATIC1111, rng_philox.py)."""
    found = normals(seed, draw, count)

    assert found.dtype == np.float32
    assert np.abs(found[[0, 1, -2, -1]] - want).max() < WITHIN


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_numbers_are_this_devices() -> None:
    """As many elements as the smallest of large devices has threads."""
    generator = torch.Generator("cuda").manual_seed(SEED)
    for draw, count in enumerate([7, 65536, 196_608, 1]):
        want = torch.randn(count, generator=generator, device="cuda").cpu().numpy()
        assert np.abs(normals(SEED, draw, count) - want).max() < WITHIN


def generator_of(seed: int) -> PhiloxGenerator:
    return philox_generator(SimpleNamespace(prepare_latents=len, scheduler=SimpleNamespace(step=len)), seed)


def test_torch_draws_from_it_while_told_to() -> None:
    """Whatever way a shape is given; draws count up; the type is asked for, the numbers are rounded to it."""
    generator, other = generator_of(42), torch.Generator().manual_seed(5)
    with PhiloxNoise():
        drawn = [
            torch.randn(3, 4, generator=generator),
            torch.randn((3, 4), generator=generator),
            torch.randn(size=(3, 4), generator=generator, dtype=torch.bfloat16),
            randn_tensor((3, 4), generator=[generator], dtype=torch.float16, device=torch.device("cpu")),
        ]
        beside = torch.randn(3, generator=other)
    generator.check()

    for draw, noise in enumerate(drawn):
        assert torch.equal(noise, torch.from_numpy(normals(42, draw, 12)).reshape(3, 4).to(noise.dtype))
    assert [noise.dtype for noise in drawn] == [torch.float32, torch.float32, torch.bfloat16, torch.float16]
    assert torch.equal(beside, torch.randn(3, generator=torch.Generator().manual_seed(5)))


def test_other_threads_are_not_told() -> None:
    """Riders draw side by side."""
    drawn = []
    with PhiloxNoise():
        thread = threading.Thread(target=lambda: drawn.append(torch.randn(2, generator=generator_of(1))))
        thread.start()
        thread.join()

    assert torch.equal(drawn[0], torch.randn(2, generator=torch.Generator().manual_seed(1)))


def test_noise_drawn_elsewhere_is_found_out() -> None:
    """A pipeline that draws by itself would draw the CPU's noise, as torch.rand does; one may draw none."""
    elsewhere, other, never = generator_of(3), generator_of(3), generator_of(3)
    torch.randn(2, generator=elsewhere)
    with PhiloxNoise():
        torch.randn(2, generator=elsewhere)
        torch.randn(2, generator=other)
        torch.rand(2, generator=other)

    for generator in (elsewhere, other, never):
        with pytest.raises(InvalidRequest, match="rng: this model draws noise"):
            generator.check()


def test_a_picture_of_other_noise_is_refused(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that draws elsewhere than in the methods that know the generator: no picture rather than a wrong one."""
    monkeypatch.setattr(drawing, "philox_generator", lambda view, seed: PhiloxGenerator("cpu").manual_seed(seed))
    asked = ImageRequest("tiny", "a red fox", "r", step_count=2, seed=1, rng=Rng.GPU_PHILOX)
    with attached(stack, "tiny", ArenaViews()) as model:
        workspace = Workspace(model.engine, WorkMemory(0))
        resolved = model.traits.resolve(asked)
        picture = Drawing(model, workspace, resolved, 0, lambda progress: None, lambda step, image: None)

        with pytest.raises(InvalidRequest, match="rng: this model draws noise"):
            under_baton(model.engine, picture.draw)


CASES = [("z_image", {}), ("qwen_image", {}), ("flux", {}), ("sdxl", {}), ("sdxl", {"solver": "euler_a"})]


@pytest.mark.parametrize(("name", "solver"), CASES, ids=lambda value: str(value))
def test_pictures_are_diffusers_with_that_noise(
    name: str, solver: dict[str, str], tiny_folders: dict[str, Path], sampler_unix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service's picture is what plain diffusers draws if its randn_tensor gives these numbers, draw after draw."""
    asked = ("a red fox", (64, 64), 3, 11)
    philox = served(sampler_unix, name, *asked, rng="gpu_philox", **solver)
    plain = served(sampler_unix, name, *asked, **solver)
    draws = iter(range(100))

    def noise(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None) -> Any:
        numbers = normals(generator.initial_seed(), next(draws), int(np.prod(shape)))
        return torch.from_numpy(numbers).reshape(tuple(shape)).to(dtype)

    pipeline = plain_pipeline(tiny_folders[name], "cpu")
    own = pipeline.scheduler
    if solver:
        import diffusers

        pipeline.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(own.config)
    for drawer in (pipeline, pipeline.scheduler):
        monkeypatch.setattr(sys.modules[type(drawer).__module__], "randn_tensor", noise)
    try:
        want = pixels(plain_picture(tiny_folders[name], *asked))
    finally:
        pipeline.scheduler = own

    assert np.array_equal(pixels(philox.images[0].pil), want)
    assert not np.array_equal(pixels(plain.images[0].pil), want)
    assert next(draws) == (4 if solver else 1)
    assert philox.finished.parameters["rng"] == "gpu_philox"


def test_models_say_that_they_take_it(sampler_unix: str) -> None:
    """All that are served do."""
    with Client(sampler_unix) as client:
        assert all("rng" in client.model(name).request_fields for name in CALLS)
