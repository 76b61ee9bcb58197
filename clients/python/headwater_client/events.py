"""What the library hands out: frozen values with units in their names. Knows neither gRPC nor protobuf."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from io import BytesIO
from pathlib import Path

import PIL.Image

from .files import write_whole
from .options import Parameters


class Word(StrEnum):
    """A word of the protocol; one that this version does not know reads as "unknown"."""

    @classmethod
    def _missing_(cls, value: object) -> "Word":
        return cls("unknown")


class Phase(Word):
    """What a picture is busy with."""

    PREPARING = "preparing"
    ENCODING = "encoding"
    DENOISING = "denoising"
    DECODING = "decoding"
    UNKNOWN = "unknown"


class Numerics(Word):
    """How arithmetic is done."""

    EAGER = "eager"
    COMPILED = "compiled"
    UNKNOWN = "unknown"


class ImageFormat(Word):
    """How a picture is encoded."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Queued:
    """The request waits; position 0 is next. estimate_s is None while unknown."""

    position: int
    estimate_s: float | None


@dataclass(frozen=True)
class Started:
    """The request was admitted. From here on it is not tried again."""

    replica: str
    model: str
    request_id: str


@dataclass(frozen=True)
class Progress:
    """Where one picture is. Steps count only while DENOISING, bytes only while PREPARING."""

    image_index: int
    phase: Phase
    step: int
    step_count: int
    sigma: float | None
    ready_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Preview:
    """A small picture of what the model expects the result to be, made after `step`; data is a PNG file."""

    image_index: int
    step: int
    data: bytes = field(repr=False)
    width_px: int
    height_px: int

    @cached_property
    def pil(self) -> PIL.Image.Image:
        """The decoded picture."""
        return _decode(self.data)


@dataclass(frozen=True)
class Image:
    """A finished picture, its size and SHA-256 checked; data is the encoded file as the server sent it.

    transfer_s: from its first part to its last, as they were read.
    """

    image_index: int
    data: bytes = field(repr=False)
    sha256: str
    format: ImageFormat
    width_px: int
    height_px: int
    seed: int
    transfer_s: float = field(default=0.0, compare=False)

    @cached_property
    def pil(self) -> PIL.Image.Image:
        """The decoded picture."""
        return _decode(self.data)

    def save(self, path: str | Path) -> None:
        """Write `data` as it is; the file appears whole or not at all. Raises OSError."""
        write_whole(Path(path), self.data)


@dataclass(frozen=True)
class Finished:
    """The request is done. queue_time_s: arrival to admission; run_time_s: admission to the last picture;
    stall_time_s: waiting for params; streamed_bytes: params copied to the device on sweeps that it rode.

    parameters: the request with every default filled in; generate(**parameters) draws the same pictures again.
    """

    seeds: tuple[int, ...]
    queue_time_s: float
    run_time_s: float
    stall_time_s: float
    streamed_bytes: int
    numerics: Numerics
    parameters: Parameters
    phase_times_s: Mapping[Phase, float]


Event = Queued | Started | Progress | Preview | Image | Finished


@dataclass(frozen=True)
class Result:
    """All of a request: pictures in order, and how it went."""

    images: tuple[Image, ...]
    started: Started | None
    finished: Finished


def _decode(data: bytes) -> PIL.Image.Image:
    image = PIL.Image.open(BytesIO(data))
    image.load()
    return image
