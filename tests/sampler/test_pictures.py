"""Pictures of the service against what plain diffusers draws from the same folder: bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from headwater_client import Client

from services.sampler.registration import Way
from tests.sampler.support import pixels, plain_picture, served
from tests.stack import Process, Stack
from tests.tiny_models import ARCHITECTURES

FOLDERS = [
    *ARCHITECTURES,
    *(f"{name}_circulating" for name in ARCHITECTURES),
    "z_image_bf16",
    "sdxl_f16",
    "flux_sharded",
]
REQUESTS = [
    ("a red fox", (64, 64), 3, 11),
    ("a lighthouse by the sea", (64, 96), 4, 12),
    ("plums on a table", (96, 64), 2, 13),
    ("two birds", (64, 64), 4, 14),
]


CUDA = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda_streaming_sampler", "cuda_resident_sampler")]


@pytest.mark.parametrize("way", ["sampler", "ring_sampler", *CUDA])
@pytest.mark.parametrize("name", FOLDERS)
def test_equals_diffusers(name: str, way: str, tiny_folders: dict[str, Path], request: pytest.FixtureRequest) -> None:
    """Four different requests at once draw what plain diffusers draws, and so does each alone."""
    address = request.getfixturevalue(way).addresses[0]
    device = "cuda" if way.startswith("cuda") else "cpu"
    references = [pixels(plain_picture(tiny_folders[name], *asked, device=device)) for asked in REQUESTS]
    assert all(r.std() > 1 for r in references)  # pictures, not flat colours

    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        together = list(pool.map(lambda asked: served(address, name, *asked), REQUESTS))
    alone = served(address, name, *REQUESTS[1])

    for reference, result in zip(references, together, strict=True):
        assert np.array_equal(pixels(result.images[0].pil), reference)
    assert np.array_equal(pixels(alone.images[0].pil), references[1])


@pytest.mark.gpu
@pytest.mark.parametrize(("page_lock", "way"), [("protected", Way.PROTECTED), ("staged", Way.STAGED)])
def test_every_way_to_the_device_draws_the_same(
    page_lock: str, way: Way, cuda_streaming_sampler: Process, stack: Stack
) -> None:
    """Where the best way of page-locking is not to be had, copies are slower and pixels the same."""
    want = served(cuda_streaming_sampler.addresses[0], "z_image_bf16", *REQUESTS[0])
    flags = ("--max-vram", "4", "--work-reserve", "1", "--no-stream-layers", "--page-lock", page_lock)
    sampler = stack.sampler("--device", "cuda", *flags)
    result = served(sampler.addresses[0], "z_image_bf16", *REQUESTS[0])

    assert way.value in sampler.wait_for("event=serving")
    assert result.images[0].sha256 == want.images[0].sha256
    assert sampler.stop() == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_param_outside_the_arena(name: str, sampler_unix: str) -> None:
    """Every param is a view of the shared copy: nothing was converted or copied on the way."""
    with Client(sampler_unix) as client:
        details = client.model(f"{name}_circulating")

    assert details.components
    assert [component.outside_bytes for component in details.components] == [0] * len(details.components)
    assert sum(component.size_bytes for component in details.components) == details.summary.size_bytes


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_count_is_seeds_one_by_one(name: str, sampler_unix: str) -> None:
    """`count = 3` gives the three pictures that the three seeds give alone."""
    three = served(sampler_unix, name, "a red fox", (64, 64), 3, 21, count=3)
    singles = [served(sampler_unix, name, "a red fox", (64, 64), 3, 21 + k) for k in range(3)]

    assert [image.seed for image in three.images] == [21, 22, 23]
    assert [image.sha256 for image in three.images] == [single.images[0].sha256 for single in singles]
    assert len({image.sha256 for image in three.images}) == 3


def test_parameters_draw_the_picture_again(sampler_unix: str, ring_sampler: Process) -> None:
    """What Finished calls the parameters, seed included, draws the same picture on another replica."""
    with Client(sampler_unix) as client:
        first = client.generate("a red fox", model="tiny")
    with Client(ring_sampler.addresses[0]) as client:
        again = client.generate(**first.finished.parameters)

    assert again.images[0].sha256 == first.images[0].sha256
    assert again.finished.parameters["steps"] == 4
