"""Reference images on their way in: decoded in worker threads, a few at a time, and bounded in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from PIL import Image

from services.errors import InvalidRequest, QueueFull
from services.sampler.references import decode, decode_mask
from services.sampler.requests import ImageRequest
from services.sampler.validation import files_of

THREADS = 2
# Of decoded images that requests hold, those that wait included; three of 40 megapixels and a mask take 0.4 GB.
LIMIT_BYTES = 2 << 30
RETRY_S = 5.0


class Intake:
    """Decodes what requests bring along, and counts the bytes until they end. Belongs to one event loop."""

    def __init__(self, thread_count: int = THREADS, limit_bytes: int = LIMIT_BYTES) -> None:
        self.held_bytes = 0
        self._limit_bytes = limit_bytes
        self._turn = asyncio.Semaphore(thread_count)

    @asynccontextmanager
    async def filled(self, request: ImageRequest, message: Any) -> AsyncGenerator[ImageRequest, None]:
        """The request with the images of its message, held for the time of the block; the message loses them.

        Raises InvalidRequest naming every image that is none, QueueFull.
        """
        files = files_of(message)
        if not files:
            yield request
            return
        message.ClearField("reference_images")
        message.ClearField("mask")
        images: dict[str, Image.Image] = {}
        taken, wrong = 0, list[tuple[str, str]]()
        try:
            for field in list(files):
                try:
                    images[field] = await self._decoded(field, files.pop(field))
                except InvalidRequest as error:
                    wrong += error.violations
                    continue
                size_bytes = size_of(images[field])
                if self.held_bytes + size_bytes > self._limit_bytes:
                    raise QueueFull("reference images of other requests fill this replica's memory for them", RETRY_S)
                self.held_bytes += size_bytes
                taken += size_bytes
            if wrong:
                raise InvalidRequest(*wrong)
            mask = images.pop("mask", None)
            yield replace(request, reference_images=tuple(images.values()), mask=mask)
        finally:
            self.held_bytes -= taken

    async def _decoded(self, field: str, data: bytes) -> Image.Image:
        async with self._turn:
            return await asyncio.to_thread(decode_mask if field == "mask" else decode, data, field)


def size_of(image: Image.Image) -> int:
    """Bytes of the decoded picture."""
    return image.width * image.height * len(image.getbands())
