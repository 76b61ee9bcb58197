"""What a model can do: its folder's pipeline, and for other tasks diffusers' siblings over the same components.

Which classes are siblings is diffusers' own table (its auto pipelines). Where it has none, a task is not offered.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import structlog
from diffusers import DiffusionPipeline
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
)
from PIL import Image

from services.errors import InvalidRequest
from services.sampler.requests import ImageRequest, Task
from services.sampler.tiling import UNTILED, TileRule
from services.sampler.traits import Traits, task_of, traits_of

SIBLINGS: dict[Task, Mapping[str, type]] = {
    Task.TEXT_TO_IMAGE: AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
    Task.IMAGE_TO_IMAGE: AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    Task.INPAINT: AUTO_INPAINT_PIPELINES_MAPPING,
}

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Abilities:
    """One pipeline and its traits for each task that a model can do; the folder's own pipeline comes first.

    All pipelines have the same modules.
    """

    pipelines: Mapping[Task, Any]
    traits: Mapping[Task, Traits]

    @property
    def own(self) -> Task:
        """The task of the folder's own pipeline."""
        return next(iter(self.pipelines))

    @property
    def tasks(self) -> list[Task]:
        return [task for task in Task if task in self.pipelines]

    @property
    def reference_limit(self) -> int:
        """Most reference images of a request; 0: this model takes none."""
        return max(traits.reference_limit for traits in self.traits.values())

    def strength_of(self, task: Task) -> float | None:
        """The default strength of a task; None if it has none, or this model does not do it."""
        return self.traits[task].strength if task in self.traits else None

    @property
    def request_fields(self) -> list[str]:
        """Names of the request fields that some task of this model takes."""
        return sorted({field for traits in self.traits.values() for field in traits.request_fields})

    def resolve(self, request: ImageRequest, rule: TileRule = UNTILED) -> ImageRequest:
        """The request with its task and every default filled in.

        Raises InvalidRequest naming all that this model cannot do.
        """
        task = self.task_of(request)
        wrong = self._violations(request, task)
        if not wrong:
            return self.traits[task].resolve(request, rule)
        fields = {field for field, _ in wrong}
        others = self.traits.get(task, self.traits[self.own]).violations(request)
        raise InvalidRequest(*wrong, *(violation for violation in others if violation[0] not in fields))

    def task_of(self, request: ImageRequest) -> Task:
        """The task that follows from what a request carries, whether this model can do it or not."""
        if not request.reference_images:
            return Task.TEXT_TO_IMAGE
        if request.mask is not None:
            return Task.INPAINT
        return Task.EDIT if Task.EDIT in self.pipelines else Task.IMAGE_TO_IMAGE

    def fitted(self, request: ImageRequest) -> ImageRequest:
        """A resolved request with its reference image in the picture's size, where that is what is drawn upon.

        As diffusers' processors do it, so most pipelines find nothing left to do; some do not resize, and some have no
        size. Takes a moment for large images. Raises InvalidRequest for images that the pipeline would not take.
        """
        traits = self.traits[request.task]
        processor = self.pipelines[request.task].image_processor
        check_images(processor, request.reference_images)
        if not request.reference_images or traits.chooses_size:
            return request
        image = processor.resize(request.reference_images[0], request.height_px, request.width_px)
        return replace(request, reference_images=(image,))

    def _violations(self, request: ImageRequest, task: Task) -> list[tuple[str, str]]:
        if task not in self.pipelines:
            able = ", ".join(each.value for each in self.tasks)
            field = "mask" if task is Task.INPAINT else "reference_images"
            if task is Task.TEXT_TO_IMAGE:
                return [(field, f"this model does no {task.value} but {able}: send the image to start from")]
            return [(field, f"this model does no {task.value} but {able}: leave it out")]
        limit, count = self.traits[task].reference_limit, len(request.reference_images)
        if count > limit:
            return [("reference_images", f"{task.value} by this model takes {limit} at most, not {count}")]
        return []


def check_images(processor: Any, images: Sequence[Image.Image]) -> None:
    """Ask a processor that has a rule for reference images (FLUX.2's: no edge too short). Raises InvalidRequest."""
    wrong = []
    for number, image in enumerate(images):
        try:
            getattr(processor, "check_image_input", lambda image: image)(image)
        except ValueError as error:
            wrong.append((f"reference_images[{number}]", str(error)))
    if wrong:
        raise InvalidRequest(*wrong)


def abilities_of(pipeline: Any, config: Path) -> Abilities:
    """What the pipeline of the folder `config` can do, siblings built. Raises UnsupportedModel, BadCheckpoint.

    Must run under the baton: building sets torch's default dtype.
    """
    classes = classes_of(type(pipeline))
    pipelines = {task: built(cls, pipeline, config) for task, cls in classes.items()}
    pipelines = {task: sibling for task, sibling in pipelines.items() if sibling is not None}
    edits = Task.EDIT in pipelines
    traits = {}
    for task, sibling in pipelines.items():
        chooses = edits and task is not Task.TEXT_TO_IMAGE and "width" in inspect.signature(sibling.__call__).parameters
        traits[task] = replace(traits_of(sibling, config, task), chooses_size=chooses)
    return Abilities(pipelines, traits)


def tasks_of_class(name: str) -> list[Task]:
    """What a model whose folder names this pipeline class can do; nothing where diffusers does not have it."""
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
        return []
    classes = classes_of(found)
    return [task for task in Task if task in classes]


def classes_of(pipeline_class: type) -> dict[Task, type]:
    """The class for each task of a model whose folder names `pipeline_class`, that one first.

    Only what draws from a prompt, or edits, has siblings: denoisers of other classes are made for their task alone
    (SDXL's refiner, inpainting with channels for the mask).
    """
    own = task_of(pipeline_class)
    classes = {own: pipeline_class}
    if own not in (Task.TEXT_TO_IMAGE, Task.EDIT):
        return classes
    name = next((n for table in SIBLINGS.values() for n, c in table.items() if c is pipeline_class), None)
    for task, table in SIBLINGS.items():
        sibling = table.get(name) if name is not None else None
        # A class that edits and is in the table of text to image needs no image.
        if sibling is not None and (task_of(sibling) is task or sibling is pipeline_class):
            classes.setdefault(task if sibling is not pipeline_class or task is Task.TEXT_TO_IMAGE else own, sibling)
    return classes


def built(cls: Any, pipeline: Any, config: Path) -> Any:
    """A pipeline of class `cls` from the folder's configs and the components of `pipeline`; None if they do not fit."""
    if type(pipeline) is cls:
        return pipeline
    known = inspect.signature(cls.__init__).parameters
    components = {n: c for n, c in pipeline.components.items() if n in known}
    try:
        sibling = cls.from_pretrained(str(config), local_files_only=True, **components)
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("a task is not offered", pipeline=cls.__name__, reason=str(error))
        return None
    sibling.set_progress_bar_config(disable=True)
    return sibling
