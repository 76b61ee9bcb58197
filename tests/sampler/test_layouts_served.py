"""Denoisers in the names and types that circulate, as files of a model that is served: diffusers' pictures."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file

from tests import original_names
from tests.sampler.bound import Tensors
from tests.sampler.packings import write_gguf
from tests.sampler.support import pixels, plain_picture, plain_pipeline, served
from tests.stack import Stack, running
from tests.tiny_models import write_folder

SIZE, STEPS, SEED, PROMPT = (64, 64), 2, 7, "a red fox"


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
    bases = {each.model for each in LAYOUTS.values()}
    folders = {name: write_folder(name, root / f"{name}_bf16", torch.bfloat16) for name in bases}
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
    sampler = stack.sampler("--test-ring")
    for name, case in cases.items():
        plain_pipeline.cache_clear()
        plain = pixels(plain_picture(case.plain, PROMPT, SIZE, STEPS, SEED))
        result = served(sampler.addresses[0], name, PROMPT, SIZE, STEPS, SEED)
        assert plain.std() > 1
        assert np.array_equal(pixels(result.images[0].pil), plain), name
    sampler.stop()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX.1 as its files circulate: denoiser and T5 in bfloat16, CLIP in float16, the autoencoder in float32."""
    root = tmp_path_factory.mktemp("mixed")
    folder = write_folder("flux", root / "flux_bf16", torch.bfloat16)
    whole = write_folder("flux", root / "flux")
    for component, dtype in (("text_encoder", torch.float16), ("vae", torch.float32)):
        (file,) = (whole / component).glob("*.safetensors")
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
        save_file(tensors, folder / component / file.name, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("flags", [(), ("--test-ring",)])
def test_components_of_other_dtypes_compute_with_the_denoisers(
    mixed: Path, flags: tuple[str, ...], tmp_path: Path
) -> None:
    """As diffusers has it with torch_dtype: pipelines do not cast what goes from one to the next."""
    with running(tmp_path, {"flux_mixed": mixed}) as stack:
        stack.loader()
        sampler = stack.sampler(*flags)
        result = served(sampler.addresses[0], "flux_mixed", PROMPT, SIZE, STEPS, SEED)

    assert np.array_equal(pixels(result.images[0].pil), pixels(plain_picture(mixed, PROMPT, SIZE, STEPS, SEED)))
