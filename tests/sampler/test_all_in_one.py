"""One file that holds all of a model: an arena for each component, and diffusers' own pictures."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from headwater.loader.v1 import loader_pb2 as pb
from safetensors.torch import load_file

from services.params.arena import attach
from services.rpc.loader_client import LoaderClient
from services.sampler.binding import build_pipeline
from tests import all_in_one
from tests.loader.support import component, prepared
from tests.sampler import inprocess
from tests.sampler.support import pixels
from tests.stack import Stack, running

CLASSES = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
Written = dict[str, tuple[Path, Path]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    root = tmp_path_factory.mktemp("whole")
    return {name: all_in_one.write(name, root) for name in CLASSES}


@pytest.fixture(scope="module")
def stack(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A loader of both models and of another name for one of them, and nothing read yet."""
    with running(tmp_path_factory.mktemp("stack"), {}) as stack:
        named = [*written.items(), ("again", written["sdxl"])]
        tables = (f'[models.{name}]\nfolder = "{folder}"\ncheckpoint = "{file}"\n' for name, (folder, file) in named)
        (stack.disk / "models.toml").write_text("".join(tables))
        stack.loader()
        yield stack


def test_each_component_has_its_part_of_the_file(stack: Stack, written: Written) -> None:
    """Byte for byte and nothing else is read; a second model of the file has the same arenas."""
    tensors = load_file(written["sdxl"][1])

    async def use() -> tuple[pb.Model, pb.Model]:
        async with LoaderClient(stack.loader_address) as client:
            return await prepared(client, "sdxl"), await prepared(client, "again")

    model, again = asyncio.run(use())

    read = 0
    for part, prefix in PREFIXES.items():
        with attach(stack.arena_dir / component(model, part).arena, component(model, part).generation) as arena:
            held = {t.name: bytes(arena.data[t.offset : t.offset + t.size_bytes]) for t in arena.tensors}
        bare = "" if part == "unet" else prefix
        wanted = {n.removeprefix(bare): t.numpy().tobytes() for n, t in tensors.items() if n.startswith(prefix)}
        assert held == wanted
        read += sum(map(len, wanted.values()))
    assert model.read_bytes == read
    assert {p.name: (p.arena, p.identity) for p in model.components} == {
        p.name: (p.arena, p.identity) for p in again.components
    }
    assert len({part.identity for part in model.components}) == len(PREFIXES)


def test_pictures_equal_those_of_diffusers_from_the_same_file(stack: Stack, written: Written) -> None:
    """diffusers reads the file by `from_single_file`, with the same configs; here params are views of the arenas."""
    for name, (folder, file) in written.items():
        plain = plain_pipeline(getattr(diffusers, CLASSES[name]), folder, file)
        with ExitStack() as leases:
            model = inprocess.prepared(stack, name)
            arenas = {
                part.name: leases.enter_context(attach(stack.arena_dir / part.arena, part.generation))
                for part in model.components
            }
            bound, _ = build_pipeline(stack.arena_dir / model.config, arenas)

            assert np.array_equal(picture(bound), picture(plain)), name


def plain_pipeline(cls: Any, folder: Path, file: Path) -> Any:
    pipeline = cls.from_single_file(
        str(file), config=str(folder), local_files_only=True, safety_checker=None, torch_dtype=torch.float32
    )
    for module in pipeline.components.values():  # at addresses that are as even as an arena's
        for param in module.parameters() if isinstance(module, torch.nn.Module) else ():
            param.data = param.data.clone()
    return pipeline


def picture(pipeline: Any) -> Any:
    torch.set_num_threads(1)
    pipeline.set_progress_bar_config(disable=True)
    call = {"width": 32, "height": 32, "num_inference_steps": 3, "guidance_scale": 5.0}
    return pixels(pipeline("a red fox", generator=torch.Generator().manual_seed(7), **call).images[0])
