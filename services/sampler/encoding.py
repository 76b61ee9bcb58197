"""Pictures as files."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

from services.sampler.requests import ImageFormat

DEFAULT_QUALITY = 90
# Below it eyes hardly see that colours have half the resolution; from it on who asks for quality gets all of them. The
# same bound as in libvips and ImageMagick.
FULL_COLOUR_QUALITY = 90


def png(image: Image.Image) -> bytes:
    """The image as a PNG file; level 1, for size hardly falls above it and time grows."""
    return _file(image, "PNG", compress_level=1)


def jpeg(image: Image.Image, quality: int) -> bytes:
    """As a baseline JPEG with Huffman tables of its own; 4:4:4 from quality 90 on, 4:2:0 below."""
    sampling = "4:4:4" if quality >= FULL_COLOUR_QUALITY else "4:2:0"
    return _file(image, "JPEG", quality=quality, subsampling=sampling, optimize=True)


def webp(image: Image.Image, quality: int) -> bytes:
    """As a lossy WebP (4:2:0 always), with libwebp's usual effort."""
    return _file(image, "WEBP", quality=quality, method=4)


def encoded(image: Image.Image, kind: ImageFormat, quality: int | None) -> bytes:
    """The image as a file of this kind; `quality`, 1 to 100, is needed by all but PNG."""
    if kind is ImageFormat.PNG:
        return png(image)
    assert quality is not None
    return (jpeg if kind is ImageFormat.JPEG else webp)(image, quality)


def _file(image: Image.Image, kind: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()
