"""What a GenerateRequest may say."""

from __future__ import annotations

import dataclasses

import pytest
from headwater.sampler.v1 import sampler_pb2 as pb

from services.errors import InvalidRequest, NotServed
from services.sampler.requests import MAX_SEED, ImageFormat, ImageRequest, Rng
from services.sampler.traits import Traits
from services.sampler.validation import image_request

TRAITS = Traits(
    arguments=frozenset({"prompt", "guidance_scale", "negative_prompt"}), size_multiple_px=16, width_px=1024,
    height_px=768, step_count=9, guidance_scale=5.0, true_cfg_scale=None, max_sequence_length=None,
)  # fmt: skip


ONE = pb.ReferenceImage(data=b"x")


def asked(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt="a fox", **fields)


@pytest.mark.parametrize(
    ("fields", "bad"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": " \n"}, "prompt"),
        ({"prompt": "x" * 16_385}, "prompt"),
        ({"negative_prompt": "x" * 16_385}, "negative_prompt"),
        ({"width_px": -1}, "width_px"),
        ({"width_px": 1}, "width_px"),
        ({"height_px": 100_000}, "height_px"),
        ({"step_count": -3}, "step_count"),
        ({"step_count": 2**31 - 1}, "step_count"),
        ({"count": 65}, "count"),
        ({"count": -1}, "count"),
        ({"seed": -1}, "seed"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"guidance_scale": -0.1}, "guidance_scale"),
        ({"true_cfg_scale": 1e30}, "true_cfg_scale"),
        ({"max_sequence_length": 0}, "max_sequence_length"),
        ({"request_id": "a/b"}, "request_id"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"preview": pb.PreviewOptions(every_step_count=-1)}, "preview.every_step_count"),
        ({"preview": pb.PreviewOptions(every_step_count=1, max_edge_px=4096)}, "preview.max_edge_px"),
        ({"output": pb.OutputOptions(quality=90)}, "output.quality"),
        ({"output": pb.OutputOptions(format=pb.IMAGE_FORMAT_PNG, quality=90)}, "output.quality"),
        ({"output": pb.OutputOptions(format=pb.IMAGE_FORMAT_JPEG, quality=0)}, "output.quality"),
        ({"output": pb.OutputOptions(format=pb.IMAGE_FORMAT_WEBP, quality=101)}, "output.quality"),
        ({"output": pb.OutputOptions(format=9)}, "output.format"),
        ({"rng": 3}, "rng"),
        ({"numerics": pb.NUMERICS_COMPILED}, "numerics"),
        ({"reference_images": [ONE] * 4}, "reference_images"),
        ({"reference_images": [ONE, pb.ReferenceImage()]}, "reference_images[1]"),
        ({"reference_images": [pb.ReferenceImage(data=bytes((16 << 20) + 1))]}, "reference_images[0]"),
        ({"reference_images": [ONE], "mask": pb.ReferenceImage()}, "mask"),
        ({"reference_images": [ONE], "strength": 1.5}, "strength"),
        ({"reference_images": [ONE], "strength": -0.5}, "strength"),
        ({"reference_images": [ONE], "strength": float("nan")}, "strength"),
        ({"mask": ONE}, "mask"),
        ({"strength": 0.5}, "strength"),
    ],
)
def test_bad_values_are_named(fields: dict[str, object], bad: str) -> None:
    """Each bad value is refused under its field's name."""
    with pytest.raises(InvalidRequest) as refused:
        image_request(pb.GenerateRequest(**{"prompt": "a fox", **fields}))

    assert [field for field, _ in refused.value.violations] == [bad]


def test_all_bad_values_are_named_at_once() -> None:
    """A caller mends a request in one go."""
    with pytest.raises(InvalidRequest) as refused:
        image_request(pb.GenerateRequest(width_px=3, step_count=-1, seed=-5))

    assert {field for field, _ in refused.value.violations} == {"prompt", "width_px", "step_count", "seed"}


@pytest.mark.parametrize(
    "fields",
    [
        {"loras": [pb.Lora(name="x")]},
    ],
)
def test_what_is_not_served_is_named(fields: dict[str, object]) -> None:
    """A field of the protocol that this server does not serve is never ignored."""
    name = next(iter(fields))
    with pytest.raises(NotServed, match=name):
        image_request(asked(**fields))


def test_every_field_is_looked_at() -> None:
    """A field added to the protocol is validated, passed on or refused: somebody has to decide."""
    from services.sampler.validation import NOT_SERVED, OPTIONAL_RANGES, RANGES

    handled = {"model", "prompt", "negative_prompt", "request_id", "preview", "output", "numerics", "tiled_decode"}
    handled |= {"solver", "schedule", "reference_images", "mask", "rng"}
    handled |= RANGES.keys() | OPTIONAL_RANGES.keys() | set(NOT_SERVED)

    assert {field.name for field in pb.GenerateRequest.DESCRIPTOR.fields} == handled


def test_strength_is_the_number_that_was_meant() -> None:
    """0.7 travels as a float32, which is a little less: of ten steps that would be six."""
    request = image_request(asked(reference_images=[ONE], strength=0.7))

    assert request.strength == 0.7


def test_lossy_formats_have_a_quality() -> None:
    """90 if nothing was said; PNG has none."""
    outputs = [
        pb.OutputOptions(),
        pb.OutputOptions(format=pb.IMAGE_FORMAT_JPEG),
        pb.OutputOptions(format=pb.IMAGE_FORMAT_WEBP, quality=1),
    ]
    requests = [image_request(asked(output=output)) for output in outputs]

    assert [(each.format, each.quality) for each in requests] == [
        (ImageFormat.PNG, None),
        (ImageFormat.JPEG, 90),
        (ImageFormat.WEBP, 1),
    ]


def test_defaults_are_the_models() -> None:
    """What was not said is filled in; a zero that was said stays."""
    filled = TRAITS.resolve(image_request(asked(guidance_scale=0.0, request_id="r")))

    assert (filled.width_px, filled.height_px, filled.step_count) == (1024, 768, 9)
    assert filled.guidance_scale == 0
    assert filled.count == 1
    assert filled.seed == image_request(asked(request_id="r")).first_seed  # from the id alone
    assert TRAITS.resolve(image_request(asked())).guidance_scale == 5


def test_the_models_own_limits() -> None:
    """Sizes off the grid and arguments that the pipeline lacks are named, with what to do."""
    with pytest.raises(InvalidRequest) as refused:
        TRAITS.resolve(image_request(asked(width_px=1000, true_cfg_scale=2.0, step_count=4)))

    assert dict(refused.value.violations).keys() == {"width_px", "true_cfg_scale"}
    assert "e.g. 992" in dict(refused.value.violations)["width_px"]


def test_a_pipeline_that_draws_by_itself() -> None:
    """Another generator than the CPU's is refused where it would not be asked."""
    philox = image_request(asked(rng=pb.RNG_GPU_PHILOX))
    with pytest.raises(InvalidRequest, match="rng: this model's pipeline draws its noise by itself"):
        TRAITS.resolve(philox)

    able = dataclasses.replace(TRAITS, takes_rng=True)
    assert able.resolve(philox).rng is Rng.GPU_PHILOX
    assert TRAITS.resolve(image_request(asked(rng=pb.RNG_CPU))).rng is Rng.CPU
    assert "rng" in able.request_fields
    assert "rng" not in TRAITS.request_fields


def test_too_many_pixels_are_named() -> None:
    """Edges that are allowed by themselves may still be too large together."""
    with pytest.raises(InvalidRequest, match="at most 16777216"):
        TRAITS.resolve(image_request(asked(width_px=8192, height_px=4096)))


def test_previews_cannot_be_rarer_than_steps() -> None:
    """A preview that would never come is an error."""
    with pytest.raises(InvalidRequest, match="every_step_count"):
        TRAITS.resolve(image_request(asked(step_count=4, preview=pb.PreviewOptions(every_step_count=5))))


def test_seeds_wrap_and_differ() -> None:
    """Picture k uses seed + k; the derived seed depends on the id alone."""
    last = ImageRequest("m", "p", "r", seed=MAX_SEED, count=2)

    assert [last.seed_of(0), last.seed_of(1)] == [MAX_SEED, 0]
    derived = dataclasses.replace(last, seed=None)
    assert derived.first_seed == dataclasses.replace(derived, prompt="other").first_seed
    assert derived.first_seed != dataclasses.replace(derived, request_id="s").first_seed
