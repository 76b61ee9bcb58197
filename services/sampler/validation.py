"""What a GenerateRequest may say, whatever the model: every bad field is named at once. Reads messages by attribute."""

from __future__ import annotations

import re
import uuid
from typing import Any

import numpy as np

from services.errors import InvalidRequest, NotServed
from services.sampler.encoding import DEFAULT_QUALITY
from services.sampler.requests import MAX_SEED, ImageFormat, ImageRequest, Numerics, Rng
from services.sampler.traits import MAX_EDGE_PX, MAX_REFERENCES, MIN_EDGE_PX

PROMPT_LIMIT = 16_384
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# field: (smallest, largest); zero or unset means the default and is let through.
RANGES: dict[str, tuple[float, float]] = {
    "width_px": (MIN_EDGE_PX, MAX_EDGE_PX),
    "height_px": (MIN_EDGE_PX, MAX_EDGE_PX),
    "step_count": (1, 1000),
    "count": (1, 64),
}
OPTIONAL_RANGES: dict[str, tuple[float, float]] = {
    "guidance_scale": (0, 100),
    "true_cfg_scale": (0, 100),
    "seed": (0, MAX_SEED),
    "max_sequence_length": (1, 4096),
    "strength": (0, 1),
}
NOT_SERVED = ("loras",)
REFERENCE_BYTES = 16 << 20
PREVIEW_EDGE_PX = (16, 512)
QUALITY = (1, 100)
FORMATS = {0: ImageFormat.PNG, 1: ImageFormat.PNG, 2: ImageFormat.JPEG, 3: ImageFormat.WEBP}
RNGS = {0: Rng.CPU, 1: Rng.CPU, 2: Rng.GPU_PHILOX}
NUMERICS = {1: Numerics.EAGER, 2: Numerics.COMPILED}


def image_request(message: Any, numerics: Numerics = Numerics.EAGER) -> ImageRequest:
    """The request that a GenerateRequest asks of a replica with these numerics, its images left out.

    Raises NotServed, InvalidRequest.
    """
    asked = [field for field in NOT_SERVED if is_set(message, field)]
    if asked:
        raise NotServed(f"not served yet: {', '.join(asked)}; leave it out")
    wrong = [*text_violations(message), *range_violations(message), *other_violations(message, numerics)]
    wrong += reference_violations(message)
    wrong += output_violations(message.output)
    if wrong:
        raise InvalidRequest(*wrong)
    encoding = FORMATS[message.output.format]
    optional = {field: getattr(message, field) for field in OPTIONAL_RANGES if message.HasField(field)}
    if "strength" in optional:
        # The number that was meant: 0.7 as a float32 is a little less, and 0.7 of ten steps are seven.
        optional["strength"] = float(str(np.float32(message.strength)))
    return ImageRequest(
        model=message.model,
        prompt=message.prompt,
        request_id=message.request_id or str(uuid.uuid4()),
        negative_prompt=message.negative_prompt,
        width_px=message.width_px,
        height_px=message.height_px,
        step_count=message.step_count,
        count=message.count or 1,
        preview_every=message.preview.every_step_count,
        preview_edge_px=message.preview.max_edge_px or 128,
        tiled_decode=message.tiled_decode if message.HasField("tiled_decode") else None,
        solver=message.solver,
        schedule=message.schedule,
        rng=RNGS[message.rng],
        format=encoding,
        quality=None if encoding is ImageFormat.PNG else message.output.quality or DEFAULT_QUALITY,
        **optional,
    )


def is_set(message: Any, field: str) -> bool:
    """Whether the sender said anything in this field."""
    descriptor = message.DESCRIPTOR.fields_by_name[field]
    return bool(message.HasField(field) if descriptor.has_presence else getattr(message, field))


def text_violations(message: Any) -> list[tuple[str, str]]:
    wrong = []
    if not message.prompt.strip():
        wrong.append(("prompt", "say what to draw; it is empty"))
    for field in ("prompt", "negative_prompt"):
        length = len(getattr(message, field))
        if length > PROMPT_LIMIT:
            wrong.append((field, f"has {length} characters, at most {PROMPT_LIMIT} are taken"))
    if message.request_id and not REQUEST_ID.fullmatch(message.request_id):
        wrong.append(("request_id", "must be 1 to 128 characters of A-Z a-z 0-9 . _ -"))
    return wrong


def range_violations(message: Any) -> list[tuple[str, str]]:
    values = [(f, getattr(message, f), *RANGES[f]) for f in RANGES if getattr(message, f)]
    values += [(f, getattr(message, f), *OPTIONAL_RANGES[f]) for f in OPTIONAL_RANGES if message.HasField(f)]
    if message.preview.max_edge_px:
        values.append(("preview.max_edge_px", message.preview.max_edge_px, *PREVIEW_EDGE_PX))
    if message.preview.every_step_count:
        values.append(("preview.every_step_count", message.preview.every_step_count, *RANGES["step_count"]))
    return [
        (field, f"must be {low:.0f} to {high:.0f}, not {value:g}")
        for field, value, low, high in values
        if not low <= value <= high  # NaN is in no range
    ]


def output_violations(output: Any) -> list[tuple[str, str]]:
    if output.format not in FORMATS:
        return [("output.format", f"must be PNG, JPEG or WEBP, not number {output.format}")]
    if not output.HasField("quality"):
        return []
    if FORMATS[output.format] is ImageFormat.PNG:
        return [("output.quality", "PNG is lossless and has no quality: leave it out")]
    low, high = QUALITY
    if not low <= output.quality <= high:
        return [("output.quality", f"must be {low} to {high}, not {output.quality}")]
    return []


def other_violations(message: Any, numerics: Numerics) -> list[tuple[str, str]]:
    wrong = []
    if message.numerics and NUMERICS.get(message.numerics) is not numerics:
        wrong.append(("numerics", f"this replica computes {numerics.value}: ask for that, or leave it out"))
    if message.rng not in RNGS:
        wrong.append(("rng", f"must be CPU or GPU_PHILOX, not number {message.rng}"))
    return wrong


def reference_violations(message: Any) -> list[tuple[str, str]]:
    count, wrong = len(message.reference_images), []
    if count > MAX_REFERENCES:
        wrong.append(("reference_images", f"at most {MAX_REFERENCES} are taken, not {count}"))
    for field, data in files_of(message).items():
        if not 0 < len(data) <= REFERENCE_BYTES:
            wrong.append((field, f"must be a file of 1 to {REFERENCE_BYTES} bytes, not {len(data)}"))
    if not count and message.HasField("mask"):
        wrong.append(("mask", "masks the first of reference_images: send that too"))
    if not count and message.HasField("strength"):
        wrong.append(("strength", "is how far to go from the first of reference_images: send that too"))
    return wrong


def files_of(message: Any) -> dict[str, bytes]:
    """The encoded images of a request by field, the mask last."""
    files = {f"reference_images[{n}]": image.data for n, image in enumerate(message.reference_images)}
    return files | ({"mask": message.mask.data} if message.HasField("mask") else {})
