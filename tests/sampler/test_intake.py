"""Reference images on their way in: decoded beside the event loop, every bad one named, and bounded in memory."""

from __future__ import annotations

import asyncio
import io
import threading

import pytest
from headwater.sampler.v1 import sampler_pb2 as pb
from PIL import Image

from services.errors import InvalidRequest, QueueFull
from services.sampler import intake
from services.sampler.intake import Intake
from services.sampler.requests import ImageRequest

REQUEST = ImageRequest("m", "a fox", "r")


def png(colour: str, size: tuple[int, int] = (40, 30)) -> pb.ReferenceImage:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return pb.ReferenceImage(data=file.getvalue())


def message(*images: pb.ReferenceImage, mask: pb.ReferenceImage | None = None) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt="a fox", reference_images=images, mask=mask)


def test_images_are_decoded_and_held_while_the_request_lives() -> None:
    """In order, the mask by itself, and the encoded files are dropped."""

    async def run() -> None:
        taken, asked = Intake(), message(png("red"), png("blue"), mask=png("white"))
        async with taken.filled(REQUEST, asked) as filled:
            assert [image.getpixel((0, 0)) for image in filled.reference_images] == [(255, 0, 0), (0, 0, 255)]
            assert filled.mask is not None
            assert (filled.mask.mode, filled.mask.getpixel((0, 0))) == ("L", 255)
            assert taken.held_bytes == 40 * 30 * (3 + 3 + 1)
            assert not asked.reference_images
        assert taken.held_bytes == 0

    asyncio.run(run())


def test_every_bad_image_is_named() -> None:
    """All at once, and nothing stays held."""

    async def run() -> None:
        taken, bad = Intake(), pb.ReferenceImage(data=b"no picture")
        with pytest.raises(InvalidRequest) as refused:
            async with taken.filled(REQUEST, message(bad, png("red"), mask=bad)):
                pass
        assert [field for field, _ in refused.value.violations] == ["reference_images[0]", "mask"]
        assert taken.held_bytes == 0

    asyncio.run(run())


def test_what_all_requests_hold_is_bounded() -> None:
    """Who comes while others fill the memory for images is told to come again, and finds room when they have gone."""

    async def run() -> None:
        taken = Intake(limit_bytes=40 * 30 * 3)
        async with taken.filled(REQUEST, message(png("red"))):
            with pytest.raises(QueueFull) as refused:
                async with taken.filled(REQUEST, message(png("red"))):
                    pass
            assert refused.value.retry_after_s > 0
        async with taken.filled(REQUEST, message(png("red"))):
            assert taken.held_bytes == 40 * 30 * 3

    asyncio.run(run())


def test_few_are_decoded_at_a_time_and_not_on_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop's thread decodes nothing, and not more than the limit are at it at once."""
    real, at_once, seen, threads = intake.decode, [0], [0], set[int]()
    lock = threading.Lock()

    def watched(data: bytes, field: str) -> Image.Image:
        with lock:
            at_once[0] += 1
            seen[0] = max(seen[0], at_once[0])
            threads.add(threading.get_ident())
        try:
            return real(data, field)
        finally:
            with lock:
                at_once[0] -= 1

    async def run() -> None:
        taken = Intake(thread_count=2)

        async def one() -> None:
            async with taken.filled(REQUEST, message(png("red", (900, 900)))):
                pass

        await asyncio.gather(*(one() for _ in range(8)))

    monkeypatch.setattr(intake, "decode", watched)
    asyncio.run(run())

    assert 1 <= seen[0] <= 2
    assert threading.get_ident() not in threads
