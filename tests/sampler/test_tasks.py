"""Image to image, inpainting and edits: each picture is what diffusers' own class for it draws from the same folder."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_inpaint as pipeline_qwenimage_edit_inpaint
from PIL import Image

from services.errors import InvalidRequest
from services.sampler.budget import Budget
from services.sampler.drawing import Drawing
from services.sampler.model import AttachedModel
from services.sampler.pixels import Pixels
from services.sampler.processors import processors_of
from services.sampler.requests import ImageRequest, Phase, Progress, Task
from services.sampler.riders import Rider
from services.sampler.ring import Ring
from services.sampler.tasks import tasks_of_class
from services.sampler.work import WorkMemory
from services.sampler.workspace import Workspace
from tests import tiny_editors, tiny_models
from tests.sampler.inprocess import attached
from tests.sampler.support import pixels
from tests.stack import Stack, running

ALL = [Task.TEXT_TO_IMAGE, Task.IMAGE_TO_IMAGE, Task.INPAINT]
# What diffusers has for each family: (tasks, class of each that takes an image).
FAMILIES = {
    "z_image": (ALL, ["ZImageImg2ImgPipeline", "ZImageInpaintPipeline"]),
    "qwen_image": (ALL, ["QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"]),
    "flux": (ALL, ["FluxImg2ImgPipeline", "FluxInpaintPipeline"]),
    "sdxl": (ALL, ["StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"]),
    "sd15": (ALL, ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"]),
    "sd3": (ALL, ["StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"]),
    "kontext": ([Task.TEXT_TO_IMAGE, Task.EDIT], ["FluxKontextPipeline"]),
    "klein": ([Task.TEXT_TO_IMAGE, Task.EDIT], ["Flux2KleinPipeline"]),
    "qwen_edit": ([Task.INPAINT, Task.EDIT], ["QwenImageEditInpaintPipeline", "QwenImageEditPipeline"]),
    "qwen_edit_plus": ([Task.EDIT], ["QwenImageEditPlusPipeline"]),
}
SEVERAL = ("qwen_edit_plus", "klein")  # take up to three images
FIELDS: dict[str, dict[str, Any]] = {
    **tiny_models.CALLS,
    "sd15": {"guidance_scale": 5.0, "negative_prompt": "a dog"},
    "sd3": {"guidance_scale": 5.0, "negative_prompt": "a dog", "max_sequence_length": 32},
    "kontext": {"guidance_scale": 3.0, "max_sequence_length": 48},
    "klein": {"guidance_scale": 3.0, "max_sequence_length": 48},
    "qwen_edit": {"true_cfg_scale": 2.5, "negative_prompt": "a dog"},
    "qwen_edit_plus": {"true_cfg_scale": 2.5, "negative_prompt": "a dog"},
}


def picture(seed: int, size: tuple[int, int] = (64, 96)) -> Image.Image:
    """Blobs of colour."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (6, 4, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


def mask(size: tuple[int, int] = (64, 96)) -> Image.Image:
    """The left half is repainted."""
    left = np.zeros((size[1], size[0]), np.uint8)
    left[:, : size[0] // 2] = 255
    return Image.fromarray(left)


@pytest.fixture(scope="module")
def folders(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("editors")
    own = {name: tiny_editors.write_folder(name, root / name) for name in tiny_editors.EDITORS}
    return {name: tiny_folders[name] for name in tiny_models.ARCHITECTURES} | own


@pytest.fixture(scope="module")
def editors(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A loader with every family."""
    with running(tmp_path_factory.mktemp("tasks"), folders) as stack:
        stack.loader("--eager-load")
        yield stack


@pytest.fixture(autouse=True)
def small_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen's edits bring references to a megapixel, which takes seconds here: let it be a 64th, for both sides."""
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus, pipeline_qwenimage_edit_inpaint):
        real = module.calculate_dimensions
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio, real=real: real(area / 64, ratio))


def open_model(stack: Stack, name: str) -> Any:
    """Attached in this process, every gate streamed through slots that are poisoned when they are left."""
    return attached(stack, name, Ring(torch.device("cpu"), Budget(1 << 40), keep_residents=False), 400_000)


def ask(name: str, task: Task, number: int, **more: Any) -> ImageRequest:
    """A request of a task; `number` tells one from another."""
    images = () if task is Task.TEXT_TO_IMAGE else (picture(number),)
    if name in SEVERAL and images:
        images = tuple(picture(number + n, (64 + 32 * n, 64)) for n in range(3))
    request = ImageRequest(
        name, f"a red fox {number}", f"r{number}", step_count=4, seed=7 + number, reference_images=images,
        mask=mask() if task is Task.INPAINT else None, **FIELDS[name],
    )  # fmt: skip
    if task in (Task.TEXT_TO_IMAGE, Task.EDIT) and name != "qwen_edit":
        request = dataclasses.replace(request, width_px=64, height_px=64)
    return dataclasses.replace(request, **more)


def draw(
    model: AttachedModel,
    *requests: ImageRequest,
    heard: list[Progress] | None = None,
    shown: list[Image.Image] | None = None,
) -> list[Image.Image]:
    """The pictures of requests that ride at once. Raises what a rider raised."""
    news, previews = [] if heard is None else heard, [] if shown is None else shown
    workspace, drawings = Workspace(model.engine, WorkMemory(0)), []
    for request in requests:
        resolved = model.abilities.fitted(model.abilities.resolve(request))
        drawings.append(Drawing(model, workspace, resolved, 0, news.append, lambda step, image: previews.append(image)))
    ended: list[Future[Rider]] = [Future() for _ in drawings]
    for drawing, end in zip(drawings, ended, strict=True):
        model.engine.ride(Rider(lambda _, d=drawing: d.draw(), end.set_result, drawing.passed, drawing.paused))
    riders = [end.result(120) for end in ended]
    for rider in riders:
        if rider.error is not None:
            raise rider.error
    return [rider.result.image() for rider in riders if isinstance(rider.result, Pixels)]


def plain(folder: Path, class_name: str) -> Any:
    """Diffusers' own pipeline of the class, from the folder."""
    import diffusers

    index = DiffusionPipeline.load_config(str(folder))
    cls = getattr(diffusers, class_name)
    absent = {component: None for component, entry in index.items() if entry == [None, None]}
    pipeline = cls.from_pretrained(folder, torch_dtype=torch.float32, **processors_of(index, folder), **absent)
    pipeline.set_progress_bar_config(disable=True)
    for module in pipeline.components.values():  # see support.plain_pipeline
        for param in module.parameters() if isinstance(module, torch.nn.Module) else ():
            param.data = param.data.clone()
    return pipeline


def expected(pipeline: Any, name: str, request: ImageRequest) -> Image.Image:
    """What diffusers draws for the same."""
    torch.set_num_threads(1)
    arguments: dict[str, Any] = dict(FIELDS[name])
    images = list(request.reference_images)
    if images:
        arguments["image"] = images if name in SEVERAL else images[0]
    if request.mask is not None:
        arguments["mask_image"] = request.mask
    if request.strength is not None:
        arguments["strength"] = request.strength
    width, height = request.width_px, request.height_px
    if images and not width and not name.startswith("qwen_edit"):
        width, height = images[0].size
    if width and "width" in inspect.signature(pipeline.__call__).parameters:
        arguments |= {"width": width, "height": height}
    if name == "kontext":
        arguments["max_area"] = width * height
    result: Image.Image = pipeline(
        prompt=request.prompt, num_inference_steps=request.step_count,
        generator=torch.Generator().manual_seed(request.seed), **arguments,
    ).images[0]  # fmt: skip
    return result


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_diffusers(name: str, folders: dict[str, Path], editors: Stack) -> None:
    """Every task of a family, two different requests of it at once, equals diffusers' class called alone."""
    tasks, classes = FAMILIES[name]
    with open_model(editors, name) as model:
        assert model.abilities.tasks == tasks
        with_images = [task for task in tasks if task is not Task.TEXT_TO_IMAGE]
        for task, class_name in zip(with_images, classes, strict=True):
            asked = [ask(name, task, 1), ask(name, task, 2)]
            drawn = draw(model, *asked)
            pipeline = plain(folders[name], class_name)
            for request, image in zip(asked, drawn, strict=True):
                reference = pixels(expected(pipeline, name, request))
                assert reference.std() > 1
                assert np.array_equal(pixels(image), reference), (task, request.request_id)


def steps_heard(heard: list[Progress]) -> list[tuple[int, int]]:
    return [(event.step, event.step_count) for event in heard if event.phase is Phase.DENOISING]


@pytest.mark.parametrize(
    ("name", "solver", "strength", "count"),
    [("flux", "", 0.7, 7), ("sdxl", "", 0.7, 7), ("sdxl", "heun", 0.5, 9), ("z_image", "", 1.0, 10)],
)
def test_strength_leaves_steps_out(
    name: str, solver: str, strength: float, count: int, folders: dict[str, Path], editors: Stack
) -> None:
    """Progress counts the steps that run, and seven tenths of ten steps are seven; encoding comes before them."""
    request = ask(name, Task.IMAGE_TO_IMAGE, 1, step_count=10, strength=strength, solver=solver)
    heard: list[Progress] = []
    with open_model(editors, name) as model:
        drawn = draw(model, request, heard=heard)

    assert steps_heard(heard)[1:] == [(step, count) for step in range(1, count + 1)]
    phases = [event.phase for event in heard if event.phase is not Phase.PREPARING]
    assert [phase for phase, _ in itertools.groupby(phases)] == [Phase.ENCODING, Phase.DENOISING, Phase.DECODING]
    if not solver:
        class_name = FAMILIES[name][1][0]
        reference = expected(plain(folders[name], class_name), name, request)
        assert np.array_equal(pixels(drawn[0]), pixels(reference))


@pytest.mark.parametrize("name", ["z_image", "sdxl", "flux"])
def test_the_reference_takes_the_pictures_size(name: str, folders: dict[str, Path], editors: Stack) -> None:
    """A named size is drawn whatever the image's is; without one, that of the image, brought to the grid."""
    odd = picture(3, (70, 101))
    asked = [
        ask(name, Task.IMAGE_TO_IMAGE, 1, reference_images=(odd,), width_px=96, height_px=64),
        ask(name, Task.IMAGE_TO_IMAGE, 2, reference_images=(odd,)),
    ]
    with open_model(editors, name) as model:
        drawn = draw(model, *asked)
        multiple = model.traits.size_multiple_px
    pipeline = plain(folders[name], FAMILIES[name][1][0])
    sizes = [(96, 64), (70 // multiple * multiple, 101 // multiple * multiple)]

    for request, image, size in zip(asked, drawn, sizes, strict=True):
        fitted = odd.resize(size, Image.Resampling.LANCZOS)
        same = dataclasses.replace(request, reference_images=(fitted,), width_px=0, height_px=0)
        assert image.size == size
        assert np.array_equal(pixels(image), pixels(expected(pipeline, name, same)))


def test_one_prompt_for_different_images(editors: Stack) -> None:
    """What an encoder made of a prompt with one image is used again for the same image, and for no other."""
    first, other = (ask("qwen_edit", Task.EDIT, 1, reference_images=(picture(n),)) for n in (1, 2))
    with open_model(editors, "qwen_edit") as model:
        alone = [*draw(model, first), *draw(model, other)]
        assert len(model.memo._results) == 4  # the prompt and the negative one, of each
        together = draw(model, first, other)
        assert len(model.memo._results) == 4
    with open_model(editors, "qwen_edit") as model:
        anew = draw(model, other)

    assert not np.array_equal(pixels(alone[0]), pixels(alone[1]))
    assert [image.tobytes() for image in together] == [image.tobytes() for image in alone]
    assert anew[0].tobytes() == alone[1].tobytes()


@pytest.mark.parametrize("name", ["klein", "qwen_edit", "kontext"])
def test_previews_of_edits(name: str, editors: Stack) -> None:
    """A preview has the shape of the picture, also where the pipeline chose that, and changes nothing."""
    request = ask(name, Task.EDIT, 1)
    with open_model(editors, name) as model:
        shown: list[Image.Image] = []
        watched = draw(model, dataclasses.replace(request, preview_every=2, preview_edge_px=64), shown=shown)[0]
        without = draw(model, request)[0]

    assert watched.tobytes() == without.tobytes()
    assert len(shown) == 1
    assert abs(shown[0].width / shown[0].height - without.width / without.height) < 0.2
    assert pixels(shown[0]).std() > 1


def fields_refused(model: AttachedModel, request: ImageRequest) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as refused:
        draw(model, request)
    return dict(refused.value.violations)


def test_what_a_model_cannot_do_is_named(editors: Stack) -> None:
    """Every field that does not fit the model's tasks is refused at once, with what the model can do."""
    two = (picture(1), picture(2))
    with open_model(editors, "flux") as model:
        refused = fields_refused(model, ask("flux", Task.IMAGE_TO_IMAGE, 1, reference_images=two, width_px=33))
        assert refused.keys() == {"reference_images", "width_px"}
        assert "takes 1 at most, not 2" in refused["reference_images"]
        refused = fields_refused(model, ask("flux", Task.IMAGE_TO_IMAGE, 1, strength=0.2))
        assert "at least 0.25" in refused["strength"]
        huge = Image.new("RGB", (5000, 4000))
        refused = fields_refused(model, ask("flux", Task.IMAGE_TO_IMAGE, 1, reference_images=(huge,)))
        assert "not 5000x4000" in refused["width_px"]
    with open_model(editors, "kontext") as model:
        refused = fields_refused(model, ask("kontext", Task.INPAINT, 1, strength=0.5))
        assert "text to image, edit" in refused["mask"]
        assert "strength" in refused
    with open_model(editors, "qwen_edit") as model:
        refused = fields_refused(model, ask("qwen_edit", Task.TEXT_TO_IMAGE, 1, solver="heun"))
        assert "inpaint, edit" in refused["reference_images"]
        assert "solver" in refused
        # Its pipeline would draw another size without a word.
        refused = fields_refused(model, ask("qwen_edit", Task.INPAINT, 1, width_px=64, height_px=64))
        assert "leave width and height out" in refused["width_px"]
    with open_model(editors, "klein") as model:
        refused = fields_refused(model, ask("klein", Task.EDIT, 1, reference_images=(picture(1), picture(2, (16, 64)))))
        assert refused.keys() == {"reference_images[1]"}


def test_tasks_follow_from_a_class() -> None:
    """Only what draws from a prompt, or edits, has siblings: other denoisers are made for their own task."""
    own = {
        "ZImagePipeline": ALL,
        "StableDiffusionXLImg2ImgPipeline": [Task.IMAGE_TO_IMAGE],
        "StableDiffusionInpaintPipeline": [Task.INPAINT],
        "FluxKontextPipeline": [Task.TEXT_TO_IMAGE, Task.EDIT],
        "QwenImageEditPlusPipeline": [Task.EDIT],
        "FluxFillPipeline": [Task.INPAINT],
        "NoSuchPipeline": [],
    }

    assert {name: tasks_of_class(name) for name in own} == own
