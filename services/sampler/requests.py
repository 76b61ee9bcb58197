"""What is asked for and what happens, as plain values. No grpc, no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import Enum

from PIL import Image

MAX_SEED = 2**63 - 1


class Phase(Enum):
    """What a picture is busy with."""

    PREPARING = "preparing"
    ENCODING = "encoding"
    DENOISING = "denoising"
    DECODING = "decoding"


class Numerics(Enum):
    """How arithmetic is done."""

    EAGER = "eager"
    COMPILED = "compiled"


class Task(Enum):
    """What a picture is made of beside the prompt."""

    TEXT_TO_IMAGE = "text to image"
    IMAGE_TO_IMAGE = "image to image"
    INPAINT = "inpaint"
    EDIT = "edit"


class ImageFormat(Enum):
    """How a picture is encoded."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"


class Rng(Enum):
    """Whose noise a seed stands for."""

    CPU = "cpu"
    GPU_PHILOX = "gpu_philox"


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """A validated request. Zero, empty or None: the model's default, filled in by `Traits.resolve`.

    A size may still be zero then: the pipeline of an edit chooses it.
    """

    model: str
    prompt: str
    request_id: str
    negative_prompt: str = ""
    width_px: int = 0
    height_px: int = 0
    step_count: int = 0
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    max_sequence_length: int | None = None
    seed: int | None = None
    count: int = 1
    preview_every: int = 0
    preview_edge_px: int = 128
    tiled_decode: bool | None = None
    solver: str = ""  # stays empty where the model's own has no common name, as does schedule
    schedule: str = ""
    reference_images: tuple[Image.Image, ...] = ()  # RGB, upright
    mask: Image.Image | None = None  # L; white is repainted
    strength: float | None = None
    task: Task = Task.TEXT_TO_IMAGE  # follows from the above and from the model, whatever is said here
    format: ImageFormat = ImageFormat.PNG
    quality: int | None = None  # 1 to 100; None for PNG, which has none
    rng: Rng = Rng.CPU

    def seed_of(self, index: int) -> int:
        """Seed of picture `index`, 0 to MAX_SEED; derived from the request's id if none was given."""
        return (self.first_seed + index) & MAX_SEED

    @property
    def first_seed(self) -> int:
        if self.seed is not None:
            return self.seed
        return int.from_bytes(hashlib.sha256(self.request_id.encode()).digest()[:8], "big") & MAX_SEED


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits behind `position` others."""

    position: int
    estimate_s: float | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """The request was admitted."""

    request: ImageRequest


@dataclass(frozen=True, slots=True)
class Progress:
    """Where one picture is."""

    image_index: int
    phase: Phase
    step: int = 0
    step_count: int = 0
    sigma: float | None = None
    ready_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Preview:
    """A glimpse of a picture, always a PNG file."""

    image_index: int
    step: int
    png: bytes
    width_px: int
    height_px: int


@dataclass(frozen=True, slots=True)
class Picture:
    """A finished picture; `data` is the encoded file."""

    image_index: int
    data: bytes
    format: ImageFormat
    width_px: int
    height_px: int
    seed: int


@dataclass(frozen=True, slots=True)
class Finished:
    """What the request was and what it cost. Seconds and bytes."""

    request: ImageRequest
    queue_s: float
    run_s: float
    stall_s: float
    streamed_bytes: int
    phase_s: dict[Phase, float] = field(default_factory=dict)


Event = Queued | Started | Progress | Preview | Picture | Finished
