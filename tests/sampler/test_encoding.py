"""Pictures as PNG, JPEG and WebP: Pillow's own files of the same pixels."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from headwater_client import Client, InvalidRequest
from PIL import Image, JpegImagePlugin

from services.sampler.encoding import encoded
from services.sampler.requests import ImageFormat
from tests.sampler.image_files import saved
from tests.sampler.support import served

GRADIENT = Image.linear_gradient("L")
PICTURE = Image.merge("RGB", [GRADIENT, GRADIENT.rotate(90), GRADIENT.rotate(180)]).resize((80, 48))


@pytest.mark.parametrize(("quality", "sampling"), [(1, 2), (89, 2), (90, 0), (100, 0)])
def test_colours_of_a_jpeg_are_whole_from_90_on(quality: int, sampling: int) -> None:
    """Half the resolution below, and no more loss than its tables make."""
    file = Image.open(io.BytesIO(encoded(PICTURE, ImageFormat.JPEG, quality)))

    assert file.format == "JPEG"
    assert JpegImagePlugin.get_sampling(file) == sampling
    want = Image.open(io.BytesIO(saved(PICTURE, "JPEG", quality=quality, subsampling=sampling)))
    assert np.array_equal(np.asarray(file), np.asarray(want))  # other Huffman tables, same pixels


@pytest.mark.parametrize("kind", [ImageFormat.JPEG, ImageFormat.WEBP])
def test_quality_costs_bytes(kind: ImageFormat) -> None:
    """And brings the picture nearer to what it was."""
    files = [encoded(PICTURE, kind, quality) for quality in (1, 50, 90, 100)]
    pixels = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int) for file in files]
    errors = [np.abs(each - np.asarray(PICTURE)).mean() for each in pixels]

    assert [len(file) for file in files] == sorted(len(file) for file in files)
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(
    ("kind", "quality", "settings"),
    [
        ("jpeg", None, {"quality": 90, "subsampling": 0, "optimize": True}),
        ("jpeg", 70, {"quality": 70, "subsampling": 2, "optimize": True}),
        ("webp", 80, {"quality": 80}),
    ],
)
def test_served_files_are_pillows(kind: str, quality: int | None, settings: dict[str, Any], sampler_unix: str) -> None:
    """The bytes that Pillow makes of the lossless picture, named for what they are; sent again they come again."""
    asked = ("z_image", "a red fox", (64, 64), 2, 5)
    lossless = served(sampler_unix, *asked).images[0]
    result = served(sampler_unix, *asked, format=kind, quality=quality)
    with Client(sampler_unix) as client:
        again = client.generate(**result.finished.parameters)

    assert (lossless.format, result.images[0].format) == ("png", kind)
    assert result.images[0].data == saved(lossless.pil, kind, **settings)
    assert again.images[0].data == result.images[0].data
    assert result.finished.parameters["quality"] == settings["quality"]


def test_png_has_no_quality(sampler_unix: str) -> None:
    """It is refused by its field's name."""
    with pytest.raises(InvalidRequest, match=r"output\.quality: PNG is lossless"):
        served(sampler_unix, "z_image", "a red fox", (64, 64), 2, 5, quality=90)
