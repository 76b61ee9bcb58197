"""Models that the loader packs as it reads them: drawn as from the unpacked numbers, whatever the file held."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file

from services.params.arena import attach
from services.rpc.loader_client import LoaderClient
from tests.sampler.support import DTYPES, pixels, plain_picture, plain_pipeline, served
from tests.stack import Stack, running
from tests.tiny_models import write_folder

SIZE, STEPS, SEED, PROMPT = (64, 64), 3, 7, "a red fox"
# Plain, by a type, and by a type with rules: T5's and CLIP's matrices, and those of adaptive norms.
OPTIONS = {
    "z_image_bf16": 'type = "q8_0"',
    "flux_bf16": 'type = "q4_0"\n[models.flux_bf16.types]\n"^text_encoder_2" = "q5_1"\n"norm1.*linear" = "q8_0"',
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("transcoded")
    return {name: write_folder(name.removesuffix("_bf16"), root / name, torch.bfloat16) for name in OPTIONS}


@pytest.fixture(scope="module")
def stack(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(tmp_path_factory.mktemp("stack"), {}) as stack:
        tables = (f'[models.{name}]\nfolder = "{folder}"\n{OPTIONS[name]}\n' for name, folder in folders.items())
        (stack.disk / "models.toml").write_text("".join(tables))
        stack.loader("--eager-load")
        yield stack


async def types(stack: Stack, model: str) -> dict[str, dict[str, str]]:
    """What tensors are in shared memory, by component and name."""
    async with LoaderClient(stack.loader_address) as client:
        parts = [message async for message in client.prepare(model)][-1].model.components
    found = {}
    for part in parts:
        with attach(stack.arena_dir / part.arena, part.generation) as arena:
            found[part.name] = {tensor.name: tensor.dtype for tensor in arena.tensors}
    return found


def unpacked(folder: Path, target: Path, kinds: dict[str, dict[str, str]]) -> Path:
    """A copy of a folder whose numbers are what the gguf package makes of them, and back, in bf16."""
    shutil.copytree(folder, target)
    for component, by_name in kinds.items():
        (file,) = (target / component).glob("*.safetensors")
        tensors = load_file(file)
        for name, kind in by_name.items():
            raw = gguf.quants.quantize(tensors[name].float().numpy(), Kind[kind])
            numbers = gguf.quants.dequantize(raw, Kind[kind]).astype(np.float32)
            tensors[name] = torch.from_numpy(numbers).bfloat16()
        save_file(tensors, file, metadata={"format": "pt"})
    return target


def test_pictures_equal_diffusers_on_the_unpacked_numbers(
    stack: Stack, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Every type, of denoisers and of three kinds of text encoders, streamed."""
    sampler = stack.sampler("--test-ring")
    for name, folder in folders.items():
        kinds = asyncio.run(types(stack, name))
        packed = {kind for by_name in kinds.values() for kind in by_name.values()} - {"BF16", "I64"}
        assert packed == ({"Q8_0"} if name == "z_image_bf16" else {"Q4_0", "Q5_1", "Q8_0"})
        assert set(kinds["vae"].values()) == {"BF16"}
        plain_pipeline.cache_clear()
        assert DTYPES[name] is torch.bfloat16
        plain = plain_picture(unpacked(folder, tmp_path / name, kinds), PROMPT, SIZE, STEPS, SEED)
        result = served(sampler.addresses[0], name, PROMPT, SIZE, STEPS, SEED)

        assert np.array_equal(pixels(result.images[0].pil), pixels(plain)), name
    sampler.stop()
