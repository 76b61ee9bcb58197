"""Stand-in: decodes reference images and masks."""

from __future__ import annotations

import io

from PIL import Image, ImageOps

from services.errors import InvalidRequest


def decode(data: bytes, field: str) -> Image.Image:
    """An RGB image, upright. Raises InvalidRequest."""
    return _open(data, field).convert("RGB")


def decode_mask(data: bytes, field: str) -> Image.Image:
    """An L image. Raises InvalidRequest."""
    return _open(data, field).convert("L")


def _open(data: bytes, field: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        return ImageOps.exif_transpose(image)
    except (OSError, ValueError) as error:
        raise InvalidRequest((field, "is no PNG, JPEG or WebP file")) from error
