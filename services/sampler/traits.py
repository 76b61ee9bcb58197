"""What a pipeline takes: fields, sizes, defaults. Reads signatures and configs, never weights."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.errors import BadCheckpoint, InvalidRequest, UnsupportedModel
from services.sampler.choices import NO_CHOICES, Choices, choices_of
from services.sampler.requests import ImageRequest, Rng
from services.sampler.tiling import UNTILED, TileRule, decode_px_bytes

# Optional fields of a request and the pipeline argument that each becomes.
ARGUMENTS = {
    "negative_prompt": "negative_prompt",
    "guidance_scale": "guidance_scale",
    "true_cfg_scale": "true_cfg_scale",
    "max_sequence_length": "max_sequence_length",
}
# Fields that every text-to-image pipeline takes.
COMMON = ("model", "prompt", "width_px", "height_px", "step_count", "seed", "count", "request_id", "preview", "output")
# A folder's own defaults, written by whoever publishes the model.
DEFAULTS_FILE = "headwater.json"
MIN_EDGE_PX, MAX_EDGE_PX = 16, 8192
MAX_AREA_PX = 1 << 24


@dataclass(frozen=True, slots=True)
class Traits:
    """What one model takes, and what it uses when nothing is said."""

    arguments: frozenset[str]  # parameters of the pipeline's call
    size_multiple_px: int
    width_px: int
    height_px: int
    step_count: int
    guidance_scale: float | None
    true_cfg_scale: float | None
    max_sequence_length: int | None
    decode_px_bytes: int = 0  # what a decode takes for a pixel, about; 0: the autoencoder has no tiles
    choices: Choices = NO_CHOICES
    takes_rng: bool = False  # whether its latents are drawn where another generator can be put in

    @property
    def can_tile(self) -> bool:
        return self.decode_px_bytes > 0

    @property
    def request_fields(self) -> list[str]:
        """Names of the request fields that this model takes."""
        own = [field for field, argument in ARGUMENTS.items() if argument in self.arguments]
        own += ["tiled_decode"] if self.can_tile else []
        own += ["rng"] if self.takes_rng else []
        own += ["solver", "schedule"] if self.choices.solvers else []
        return sorted([*COMMON, *own])

    def resolve(self, request: ImageRequest, rule: TileRule = UNTILED) -> ImageRequest:
        """The request with every default filled in; `rule` is the replica's.

        Raises InvalidRequest naming all that this model cannot do.
        """
        wrong = [
            (field, "this model has no use for it: leave it out")
            for field, argument in ARGUMENTS.items()
            if getattr(request, field) not in (None, "") and argument not in self.arguments
        ]
        solver, schedule = self.choices.filled(request.solver, request.schedule)
        filled = dataclasses.replace(
            request,
            seed=request.first_seed,
            solver=solver,
            schedule=schedule,
            **{
                field: getattr(self, field)
                for field in ("width_px", "height_px", "step_count", *ARGUMENTS)
                if field != "negative_prompt" and getattr(request, field) in (None, 0)
                if not (getattr(request, field) == 0 and field.endswith("_scale"))
            },
        )
        for field in ("width_px", "height_px"):
            size = getattr(filled, field)
            if size % self.size_multiple_px:
                near = max(1, round(size / self.size_multiple_px)) * self.size_multiple_px
                wrong.append((field, f"must be a multiple of {self.size_multiple_px}, e.g. {near}, not {size}"))
        if filled.width_px * filled.height_px > MAX_AREA_PX:
            wrong.append(("width_px", f"width_px times height_px must be at most {MAX_AREA_PX}"))
        if filled.preview_every > filled.step_count:
            wrong.append(("preview.every_step_count", f"must be at most step_count, {filled.step_count}"))
        if filled.tiled_decode and not self.can_tile:
            wrong.append(("tiled_decode", "this model's autoencoder has no tiles: leave it out"))
        if request.rng is not Rng.CPU and not self.takes_rng:
            wrong.append(("rng", "this model's pipeline draws its noise by itself: leave it out"))
        wrong += self.choices.violations(request.solver, request.schedule, filled.step_count)
        if wrong:
            raise InvalidRequest(*wrong)
        if filled.tiled_decode is None:
            tiled = self.can_tile and rule.tiles(filled.width_px * filled.height_px, self.decode_px_bytes)
            return dataclasses.replace(filled, tiled_decode=tiled)
        return filled

    def call_arguments(self, request: ImageRequest) -> dict[str, object]:
        """Keyword arguments of the pipeline's call for a resolved request, the generator excepted."""
        optional = {argument: getattr(request, field) for field, argument in ARGUMENTS.items()}
        return {
            "prompt": request.prompt,
            "width": request.width_px,
            "height": request.height_px,
            "num_inference_steps": request.step_count,
            **{a: v for a, v in optional.items() if a in self.arguments and v not in (None, "")},
        }


def traits_of(pipeline: Any, config: Path) -> Traits:
    """Traits of a pipeline, defaults of its folder included. Raises UnsupportedModel, BadCheckpoint."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    needed = {"prompt", "width", "height", "num_inference_steps", "generator", "output_type"}
    parts = all(hasattr(pipeline, part) for part in ("scheduler", "vae", "image_processor"))
    if "image" in parameters or not needed <= parameters.keys() or not parts:
        raise UnsupportedModel(
            f"{type(pipeline).__name__} is no text-to-image pipeline, which is what is served so far"
        )
    own = read_defaults(config)

    def default(argument: str) -> Any:
        value = parameters[argument].default if argument in parameters else None
        return value if isinstance(value, int | float) else None

    multiple = pipeline.image_processor.config.vae_scale_factor
    edge = getattr(pipeline, "default_sample_size", None)
    edge_px = edge * pipeline.vae_scale_factor if isinstance(edge, int) else 1024
    return Traits(
        arguments=frozenset(parameters),
        size_multiple_px=multiple,
        width_px=int(own.get("width_px", edge_px)),
        height_px=int(own.get("height_px", edge_px)),
        step_count=int(own.get("step_count", default("num_inference_steps") or 50)),
        guidance_scale=own.get("guidance_scale", default("guidance_scale")),
        true_cfg_scale=own.get("true_cfg_scale", default("true_cfg_scale")),
        max_sequence_length=own.get("max_sequence_length", default("max_sequence_length")),
        decode_px_bytes=decode_cost(pipeline.vae),
        choices=choices_of(pipeline),
        takes_rng=takes_rng(pipeline),
    )


def takes_rng(pipeline: Any) -> bool:
    """Whether the pipeline draws its latents in a method of its own, from the generator that it is given."""
    method = getattr(pipeline, "prepare_latents", None)
    return method is not None and "generator" in inspect.signature(method).parameters


def decode_cost(vae: Any) -> int:
    """Bytes that a decode takes for a pixel, about; 0 for an autoencoder without tiles."""
    # diffusers gives every autoencoder the method, and the switch only to those that look at it.
    if not (hasattr(vae, "enable_tiling") and hasattr(vae, "use_tiling")):
        return 0
    upcast = str(vae.dtype) == "torch.float16" and bool(vae.config.get("force_upcast"))
    return decode_px_bytes(vae.config, 4 if upcast else vae.dtype.itemsize)


def read_defaults(config: Path) -> Mapping[str, Any]:
    """The folder's headwater.json, empty if it has none."""
    try:
        own = json.loads((config / DEFAULTS_FILE).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise BadCheckpoint(f"{DEFAULTS_FILE} is no JSON") from error
    known = {"width_px", "height_px", "step_count", "guidance_scale", "true_cfg_scale", "max_sequence_length"}
    if not isinstance(own, dict) or not own.keys() <= known:
        raise BadCheckpoint(f"{DEFAULTS_FILE} may hold {', '.join(sorted(known))} and nothing else")
    return own
