"""What can be asked of a picture, in the library's words."""

import os
from collections.abc import Sequence
from typing import Required, TypedDict

# An encoded picture (PNG, JPEG or WebP), or the path of its file.
Source = bytes | str | os.PathLike[str]


class Options(TypedDict, total=False):
    """Options of generate() and stream(). What is left out, or None, is the model's default or the server's.

    width, height: pixels. seed: of the first picture, the next ones count up. count: pictures.
    preview_every: steps between previews; preview_edge: their longest edge in pixels.
    format: "png", "jpeg" or "webp"; quality: of the last two, 1 to 100.
    numerics: "eager" or "compiled"; refused if the server is set up otherwise.
    tiled_decode: decode pictures in overlapping tiles: less memory, slightly other pixels at the seams.
    solver, schedule: common names, e.g. "dpm++2m" and "karras"; `model(name)` lists those that the model can use.
    images: pictures to start from, or to refer to where the model edits. mask: where to repaint the one picture, white
    is repainted. strength: how far to move from it, 0 to 1. `model(name)` lists what tasks the model can do.
    rng: "cpu" or "gpu_philox": whose noise the seed stands for; the second is that of CUDA devices and of web UIs.
    request_id: names the request in the server's log and derives the seed; a random UUID by default.
    """

    model: str | None
    negative_prompt: str | None
    width: int | None
    height: int | None
    steps: int | None
    guidance_scale: float | None
    true_cfg_scale: float | None
    seed: int | None
    count: int | None
    request_id: str | None
    max_sequence_length: int | None
    preview_every: int | None
    preview_edge: int | None
    format: str | None
    quality: int | None
    numerics: str | None
    tiled_decode: bool | None
    solver: str | None
    schedule: str | None
    images: Sequence[Source] | None
    mask: Source | None
    strength: float | None
    rng: str | None


class Parameters(Options, total=False):
    """Options together with the prompt: all that a request is."""

    prompt: Required[str]
