"""Tasks as callers meet them: over gRPC, by the Python client and the command."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from headwater_client import Client, HeadwaterError, InvalidRequest, Result, Task
from PIL import Image

from services.sampler.requests import ImageRequest
from tests.sampler.support import pixels
from tests.sampler.test_tasks import FIELDS, expected, mask, picture, plain
from tests.stack import Process


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def ask(address: str, model: str, number: int, **options: Any) -> Result:
    call = FIELDS[model]
    with Client(address) as client:
        images = [png(picture(number))]
        return client.generate("a red fox", model=model, steps=4, seed=7, images=images, timeout=120, **call, **options)


def asked_for(model: str, number: int, **more: Any) -> ImageRequest:
    """The same, for `expected`."""
    return ImageRequest(
        model, "a red fox", "r", step_count=4, seed=7, reference_images=(picture(number),), **more
    )  # fmt: skip


@pytest.mark.parametrize("way", ["sampler", "ring_sampler"])
def test_edits_at_once(way: str, tiny_folders: dict[str, Path], request: pytest.FixtureRequest) -> None:
    """Different edits at once, each as diffusers draws it alone; Finished says the size that the pipeline chose."""
    address = request.getfixturevalue(way).addresses[0]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda number: ask(address, "klein", number), (1, 2)))
    pipeline = plain(tiny_folders["klein"], "Flux2KleinPipeline")
    for number, result in zip((1, 2), results, strict=True):
        reference = expected(pipeline, "klein", asked_for("klein", number))
        assert np.array_equal(pixels(result.images[0].pil), pixels(reference))
        assert (result.finished.parameters["width"], result.finished.parameters["height"]) == (64, 96)


def test_repainting_over_the_wire(sampler_unix: str, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """A mask, a strength that float32 cannot hold, and what is echoed of them draws the same again."""
    result = ask(sampler_unix, "flux", 1, mask=png(mask()), strength=0.7)
    pipeline = plain(tiny_folders["flux"], "FluxInpaintPipeline")
    reference = expected(pipeline, "flux", asked_for("flux", 1, mask=mask(), strength=0.7))
    assert np.array_equal(pixels(result.images[0].pil), pixels(reference))

    file = tmp_path / "start.png"
    file.write_bytes(png(picture(1)))
    with Client(sampler_unix) as client:
        again = client.generate(**result.finished.parameters, images=[file], mask=png(mask()))
    assert again.images[0].sha256 == result.images[0].sha256
    assert result.finished.parameters["strength"] == pytest.approx(0.7)


def test_models_say_what_they_can_do(sampler_unix: str) -> None:
    """Tasks are in the list also for models that are not attached; details tell the rest."""
    with Client(sampler_unix) as client:
        tasks = {model.name: model.tasks for model in client.models()}
        flux, klein = client.model("flux"), client.model("klein")

    assert tasks["flux_sharded"] == (Task.TEXT_TO_IMAGE, Task.IMAGE_TO_IMAGE, Task.INPAINT) == flux.tasks
    assert tasks["klein"] == (Task.TEXT_TO_IMAGE, Task.EDIT) == klein.tasks
    assert (flux.max_reference_image_count, klein.max_reference_image_count) == (1, 3)
    assert flux.default_strength == pytest.approx(0.6)
    assert klein.default_strength is None
    assert {"reference_images", "mask", "strength"} <= set(flux.request_fields)
    assert "mask" not in klein.request_fields


def test_large_files_arrive(sampler_unix: str) -> None:
    """Three files and a mask of 16 MiB each are looked at; beyond that the call is refused, and not the connection."""
    most, more = bytes(16 << 20), bytes((16 << 20) + (2 << 20))
    with Client(sampler_unix) as client:
        with pytest.raises(InvalidRequest) as refused:
            client.generate("a fox", model="flux", images=[most] * 3, mask=most)
        fields = {field for field, _ in refused.value.violations}
        assert fields == {"mask", "reference_images[0]", "reference_images[1]", "reference_images[2]"}
        with pytest.raises(HeadwaterError) as large:
            client.generate("a fox", model="flux", images=[most] * 3, mask=more)
        assert large.value.code == "RESOURCE_EXHAUSTED"
        assert client.models()


def test_the_command_takes_files(sampler: Process, tmp_path: Path) -> None:
    """`--image`, `--mask` and `--strength`; a file that is not there is one line."""
    (tmp_path / "in.png").write_bytes(png(picture(1)))
    (tmp_path / "mask.png").write_bytes(png(mask()))
    command = [sys.executable, "-m", "headwater_client.cli"]
    environment = os.environ | {"HEADWATER_ADDRESS": sampler.addresses[0], "PYTHONPATH": os.pathsep.join(sys.path)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )

    asked = ["generate", "a red fox", "--model", "flux", "--steps", "4", "--seed", "7", "--json"]
    done = run(*asked, "--image", "in.png", "--mask", "mask.png", "--strength", "0.7")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    with Image.open(tmp_path / "out.png") as out:
        assert out.size == (64, 96)
    assert document["parameters"]["strength"] == pytest.approx(0.7)
    missing = run(*asked, "--image", "none.png")
    assert missing.returncode == 1
    assert missing.stderr == "headwater: error: images: cannot be read: No such file or directory: none.png\n"
    shown = run("model", "klein")
    assert "text to image, edit" in shown.stdout
