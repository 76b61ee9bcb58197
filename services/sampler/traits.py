"""What a pipeline takes for one task: fields, sizes, defaults. Reads signatures and configs, never weights."""

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
from services.sampler.requests import ImageRequest, Rng, Task
from services.sampler.tiling import UNTILED, TileRule, decode_px_bytes

# Optional fields of a request and the pipeline argument that each becomes.
ARGUMENTS = {
    "negative_prompt": "negative_prompt",
    "guidance_scale": "guidance_scale",
    "true_cfg_scale": "true_cfg_scale",
    "max_sequence_length": "max_sequence_length",
    "strength": "strength",
}
# Fields that every pipeline takes.
COMMON = ("model", "prompt", "width_px", "height_px", "step_count", "seed", "count", "request_id", "preview", "output")
# A folder's own defaults, written by whoever publishes the model.
DEFAULTS_FILE = "headwater.json"
MIN_EDGE_PX, MAX_EDGE_PX = 16, 8192
MAX_AREA_PX = 1 << 24
# Reference images of one request, where the pipeline takes more than one.
MAX_REFERENCES = 3
# What a call needs, whatever its task.
NEEDED = {"prompt", "num_inference_steps", "generator", "output_type"}


@dataclass(frozen=True, slots=True)
class Traits:
    """What one model takes for one task, and what it uses when nothing is said."""

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
    task: Task = Task.TEXT_TO_IMAGE
    strength: float | None = None
    reference_limit: int = 0
    chooses_size: bool = False  # the pipeline does, where the request does not
    takes_rng: bool = False  # whether its latents are drawn where another generator can be put in

    @property
    def can_tile(self) -> bool:
        return self.decode_px_bytes > 0

    @property
    def request_fields(self) -> list[str]:
        """Names of the request fields that this task takes."""
        own = [field for field, argument in ARGUMENTS.items() if argument in self.arguments]
        own += ["tiled_decode"] if self.can_tile else []
        own += ["rng"] if self.takes_rng else []
        own += ["solver", "schedule"] if self.choices.solvers else []
        own += ["reference_images"] if self.reference_limit else []
        own += ["mask"] if self.task is Task.INPAINT else []
        return sorted([*COMMON, *own])

    def resolve(self, request: ImageRequest, rule: TileRule = UNTILED) -> ImageRequest:
        """The request with every default filled in; `rule` is the replica's.

        Raises InvalidRequest naming all that this model cannot do.
        """
        filled = self._filled(request)
        wrong = self.violations(request, filled)
        if wrong:
            raise InvalidRequest(*wrong)
        if filled.tiled_decode is None:
            width, height = self.expected_size(filled)
            tiled = self.can_tile and rule.tiles(width * height, self.decode_px_bytes)
            return dataclasses.replace(filled, tiled_decode=tiled)
        return filled

    def violations(self, request: ImageRequest, filled: ImageRequest | None = None) -> list[tuple[str, str]]:
        """(field, what to do) for all that this model cannot do for this task."""
        filled = filled or self._filled(request)
        whose = "this model" if self.task is Task.TEXT_TO_IMAGE else f"{self.task.value} by this model"
        wrong = [
            (field, f"{whose} has no use for it: leave it out")
            for field, argument in ARGUMENTS.items()
            if getattr(request, field) not in (None, "") and argument not in self.arguments
        ]
        wrong += self._size_violations(filled)
        if filled.preview_every > filled.step_count:
            wrong.append(("preview.every_step_count", f"must be at most step_count, {filled.step_count}"))
        if filled.tiled_decode and not self.can_tile:
            wrong.append(("tiled_decode", "this model's autoencoder has no tiles: leave it out"))
        if request.rng is not Rng.CPU and not self.takes_rng:
            wrong.append(("rng", "this model's pipeline draws its noise by itself: leave it out"))
        if (
            filled.strength is not None
            and "strength" in self.arguments
            and int(filled.strength * filled.step_count) < 1
        ):
            least = f"at least {1 / filled.step_count:.3g}, or more steps"
            wrong.append(("strength", f"{filled.strength:g} of {filled.step_count} steps leaves none: {least}"))
        return wrong + self.choices.violations(request.solver, request.schedule, filled.step_count)

    def expected_size(self, request: ImageRequest) -> tuple[int, int]:
        """(width, height) of the picture, the model's own for those that the pipeline will choose."""
        return request.width_px or self.width_px, request.height_px or self.height_px

    def call_arguments(self, request: ImageRequest) -> dict[str, object]:
        """Keyword arguments of the pipeline's call for a resolved request, the generator excepted."""
        width, height = request.width_px or None, request.height_px or None
        optional: dict[str, object] = {argument: getattr(request, field) for field, argument in ARGUMENTS.items()}
        optional |= {"width": width, "height": height, "mask_image": request.mask}
        if request.reference_images:
            images = list(request.reference_images)
            optional["image"] = images if self.reference_limit > 1 else images[0]
        if width and height:
            optional["max_area"] = width * height  # else the pipeline would scale the size to an area of its own
        return {
            "prompt": request.prompt,
            "num_inference_steps": request.step_count,
            **{a: v for a, v in optional.items() if a in self.arguments and v not in (None, "")},
        }

    def _filled(self, request: ImageRequest) -> ImageRequest:
        solver, schedule = self.choices.filled(request.solver, request.schedule)
        width, height = self._default_size(request)
        return dataclasses.replace(
            request,
            task=self.task,
            seed=request.first_seed,
            solver=solver,
            schedule=schedule,
            width_px=request.width_px or width,
            height_px=request.height_px or height,
            step_count=request.step_count or self.step_count,
            **{
                field: getattr(self, field)
                for field in ARGUMENTS
                if field != "negative_prompt" and getattr(request, field) is None
            },
        )

    def _default_size(self, request: ImageRequest) -> tuple[int, int]:
        """(width, height) where none is said: the model's, or the reference image's on the grid; 0: the pipeline's."""
        if self.chooses_size:
            return 0, 0
        if not (self.reference_limit and request.reference_images):
            return self.width_px, self.height_px
        width, height = (e - e % self.size_multiple_px for e in request.reference_images[0].size)
        return max(width, self.size_multiple_px), max(height, self.size_multiple_px)

    def _size_violations(self, filled: ImageRequest) -> list[tuple[str, str]]:
        wrong = []
        for field in ("width_px", "height_px"):
            size = getattr(filled, field)
            if size % self.size_multiple_px:
                near = max(1, round(size / self.size_multiple_px)) * self.size_multiple_px
                wrong.append((field, f"must be a multiple of {self.size_multiple_px}, e.g. {near}, not {size}"))
        if filled.width_px * filled.height_px > MAX_AREA_PX:
            size = f"{filled.width_px}x{filled.height_px}"
            wrong.append(("width_px", f"width_px times height_px must be at most {MAX_AREA_PX}, not {size}"))
        return wrong


def traits_of(pipeline: Any, config: Path, task: Task | None = None) -> Traits:
    """Traits of a pipeline for a task (None: its class's own), defaults of its folder included.

    Raises UnsupportedModel, BadCheckpoint.
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    task = task or task_of(type(pipeline))
    needed = NEEDED | {"width", "height"} if task is Task.TEXT_TO_IMAGE else NEEDED
    parts = all(hasattr(pipeline, part) for part in ("scheduler", "vae", "image_processor"))
    if not needed <= parameters.keys() or not parts:
        raise UnsupportedModel(f"{type(pipeline).__name__} draws no pictures from a prompt, which is what is served")
    own = read_defaults(config)

    def default(argument: str) -> Any:
        value = parameters[argument].default if argument in parameters else None
        return value if isinstance(value, int | float) else None

    edge = getattr(pipeline, "default_sample_size", None)
    edge_px = edge * pipeline.vae_scale_factor if isinstance(edge, int) else 1024
    return Traits(
        arguments=frozenset(parameters),
        size_multiple_px=pipeline.image_processor.config.vae_scale_factor,
        width_px=int(own.get("width_px", edge_px)),
        height_px=int(own.get("height_px", edge_px)),
        step_count=int(own.get("step_count", default("num_inference_steps") or 50)),
        guidance_scale=own.get("guidance_scale", default("guidance_scale")),
        true_cfg_scale=own.get("true_cfg_scale", default("true_cfg_scale")),
        max_sequence_length=own.get("max_sequence_length", default("max_sequence_length")),
        decode_px_bytes=decode_cost(pipeline.vae),
        choices=choices_of(pipeline),
        task=task,
        strength=default("strength"),
        reference_limit=0 if task is Task.TEXT_TO_IMAGE else reference_limit(type(pipeline)),
        takes_rng=takes_rng(pipeline),
    )


def task_of(pipeline_class: type) -> Task:
    """What a pipeline's call makes pictures of, by its parameters."""
    parameters = inspect.signature(pipeline_class.__call__).parameters
    if "mask_image" in parameters:
        return Task.INPAINT
    if "image" not in parameters:
        return Task.TEXT_TO_IMAGE
    return Task.IMAGE_TO_IMAGE if "strength" in parameters else Task.EDIT


def reference_limit(pipeline_class: Any) -> int:
    """How many reference images a pipeline combines: several if it prepares `images`, for others a list is a batch."""
    if task_of(pipeline_class) is not Task.EDIT:
        return 1
    prepare = [getattr(pipeline_class, name, None) for name in ("prepare_latents", "prepare_image_latents")]
    several = any("images" in inspect.signature(method).parameters for method in prepare if method is not None)
    return MAX_REFERENCES if several else 1


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
