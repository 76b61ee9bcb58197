"""Denoisers in the names and types that circulate, as files of a model that is served: diffusers' pictures."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from headwater_client import Client
from safetensors.torch import load_file, save_file

from tests import original_names, tiny_editors
from tests.sampler.bound import Tensors
from tests.sampler.packings import write_gguf
from tests.sampler.support import pixels, plain_picture, plain_pipeline, served
from tests.stack import Stack, running
from tests.tiny_models import ARCHITECTURES, CALLS, write_folder

SIZE, STEPS, SEED, PROMPT = (64, 64), 2, 7, "a red fox"
MODELS = {**ARCHITECTURES, "sd3": tiny_editors.sd3, "sd15": tiny_editors.sd15}
GUIDED = {"guidance_scale": 5.0, "negative_prompt": "a dog"}
OPTIONS = {**CALLS, "sd3": {**GUIDED, "max_sequence_length": 48}, "sd15": GUIDED}


def comfy(tensors: Tensors) -> Tensors:
    return {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Layout:
    """A model, which of its components a file stands for, and what that file is."""

    model: str
    component: str
    names: Callable[[Tensors], Tensors]
    kind: Kind


LAYOUTS = {
    "sdxl_comfy": Layout("sdxl", "unet", lambda tensors: comfy(original_names.unet(tensors)), Kind.BF16),
    "sdxl_gguf": Layout("sdxl", "unet", original_names.unet, Kind.Q8_0),
    "sdxl_vae": Layout("sdxl", "vae", original_names.vae, Kind.BF16),
    "qwen_image_gguf": Layout("qwen_image", "transformer", comfy, Kind.Q5_1),
    "flux_original": Layout("flux", "transformer", original_names.flux, Kind.BF16),
    "flux_gguf": Layout("flux", "transformer", original_names.flux, Kind.Q4_0),
    "sd3_original": Layout("sd3", "transformer", original_names.sd3, Kind.BF16),
    "sd3_gguf": Layout("sd3", "transformer", lambda tensors: comfy(original_names.sd3(tensors)), Kind.Q8_0),
    "sd15_gguf": Layout("sd15", "unet", lambda tensors: comfy(original_names.unet(tensors, 1)), Kind.Q8_0),
}


@dataclass(frozen=True)
class Case:
    """A folder whose component is a file elsewhere, and one that has the same numbers by diffusers' names."""

    folder: Path
    file: Path
    plain: Path


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("layouts")
    folders = {name: root / f"{name}_bf16" for name in dict.fromkeys(each.model for each in LAYOUTS.values())}
    for name, folder in folders.items():
        MODELS[name]().to(torch.bfloat16).save_pretrained(folder)
    return {name: written(layout, folders[layout.model], root / name) for name, layout in LAYOUTS.items()}


def written(layout: Layout, base: Path, root: Path) -> Case:
    weights = next((base / layout.component).glob("*.safetensors"))
    tensors = load_file(weights)
    folder, plain = (Path(shutil.copytree(base, root / part / base.name)) for part in ("served", "plain"))
    (folder / layout.component / weights.name).unlink()
    if layout.kind is Kind.BF16:
        save_file({k: v.contiguous() for k, v in layout.names(tensors).items()}, root / "model.safetensors")
        return Case(folder, root / "model.safetensors", plain)
    write_gguf(root / "model.gguf", layout.names(tensors), layout.kind)
    numbers = write_gguf(root / "numbers.gguf", tensors, layout.kind)
    save_file(numbers, plain / layout.component / weights.name, metadata={"format": "pt"})
    return Case(folder, root / "model.gguf", plain)


@pytest.fixture(scope="module")
def stack(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(tmp_path_factory.mktemp("stack"), {name: case.folder for name, case in cases.items()}) as stack:
        files = (f'[models.{n}.files]\n{LAYOUTS[n].component} = "{case.file}"\n' for n, case in cases.items())
        with (stack.disk / "models.toml").open("a") as models:
            models.writelines(files)
        stack.loader("--eager-load")
        yield stack


def test_pictures_equal_diffusers(stack: Stack, cases: dict[str, Case]) -> None:
    """Plain as the same tensors by diffusers' names, packed as the unpacked numbers."""
    sampler = stack.sampler("--test-ring", module="tests.sampler.narrow_flux_sampler")
    for name, case in cases.items():
        plain_pipeline.cache_clear()
        options: dict[str, Any] = OPTIONS[LAYOUTS[name].model]
        plain = pixels(plain_picture(case.plain, PROMPT, SIZE, STEPS, SEED, options))
        with Client(sampler.addresses[0]) as client:
            result = client.generate(
                PROMPT, model=name, width=SIZE[0], height=SIZE[1], steps=STEPS, seed=SEED, timeout=120, **options
            )
        assert plain.std() > 1, name
        assert np.array_equal(pixels(result.images[0].pil), plain), name
    sampler.stop()


# As files circulate: by model, its dtype, and components that have another one.
MIXED = {
    "flux_bf16": (torch.bfloat16, {"text_encoder": torch.float16, "vae": torch.float32}),
    "sdxl_f16": (torch.float16, {"vae": torch.float32}),  # which the pipeline casts back in mid-request
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixed")
    for name, (dtype, others) in MIXED.items():
        write_folder(name.split("_")[0], root / name, dtype)
        whole = write_folder(name.split("_")[0], root / "whole" / name)
        for component, other in others.items():
            (file,) = (whole / component).glob("*.safetensors")
            tensors = {key: tensor.to(other) for key, tensor in load_file(file).items()}
            save_file(tensors, root / name / component / file.name, metadata={"format": "pt"})
    return {name: root / name for name in MIXED}


@pytest.mark.parametrize("flags", [(), ("--test-ring",)])
def test_components_of_other_dtypes_compute_with_the_denoisers(
    mixed: dict[str, Path], flags: tuple[str, ...], tmp_path: Path
) -> None:
    """As diffusers has it with torch_dtype: pipelines do not cast what goes from one to the next."""
    with running(tmp_path, mixed) as stack:
        stack.loader()
        sampler = stack.sampler(*flags)
        for name, folder in mixed.items():
            result = served(sampler.addresses[0], name, PROMPT, SIZE, STEPS, SEED)
            plain = pixels(plain_picture(folder, PROMPT, SIZE, STEPS, SEED))
            assert np.array_equal(pixels(result.images[0].pil), plain), name
