"""What plain diffusers draws from a folder, to compare with."""

from __future__ import annotations

import functools
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from headwater_client import Client, Result
from numpy.typing import NDArray
from PIL import Image

from tests.stack import Stack
from tests.tiny_models import CALLS

HALVES = ("z_image_bf16", "flux_bf16", "sdxl_bf16", "qwen_image_bf16", "sd3_bf16", "sd15_bf16")
DTYPES = dict.fromkeys(HALVES, torch.bfloat16)
DTYPES["sdxl_f16"] = torch.float16


def architecture(name: str) -> str:
    """`flux` of `flux_circulating`."""
    return next(a for a in sorted(CALLS, key=len, reverse=True) if name.startswith(a))


@functools.lru_cache(maxsize=1)
def plain_pipeline(folder: Path, device: str) -> Any:
    index = json.loads((folder / "model_index.json").read_text())
    absent: dict[str, Any] = {name: None for name, entry in index.items() if entry == [None, None]}
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=DTYPES.get(folder.name, torch.float32), **absent)
    pipeline.set_progress_bar_config(disable=True)
    # Params are views of the mapped file, at addresses that are multiples of 8 only. Matrix products of a CPU (MKL, on
    # AMD) give other last bits there than at a tensor's usual 64; arenas and slots keep 512.
    for module in pipeline.components.values():
        for param in module.parameters() if isinstance(module, torch.nn.Module) else ():
            param.data = param.data.clone()
    return pipeline.to(device)


def plain_picture(
    folder: Path,
    prompt: str,
    size: tuple[int, int],
    steps: int,
    seed: int,
    call: dict[str, Any] | None = None,
    device: str = "cpu",
    tiled: bool = False,
) -> Image.Image:
    """The folder's own pipeline, loaded and called as its documentation says."""
    torch.set_num_threads(1)
    pipeline = plain_pipeline(folder, device)
    (pipeline.vae.enable_tiling if tiled else pipeline.vae.disable_tiling)()
    picture: Image.Image = pipeline(
        prompt=prompt, width=size[0], height=size[1], num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed), **(CALLS[architecture(folder.name)] if call is None else call),
    ).images[0]  # fmt: skip
    return picture


def served(address: str, model: str, prompt: str, size: tuple[int, int], steps: int, seed: int, **more: Any) -> Result:
    """The same through the service."""
    options: dict[str, Any] = dict(CALLS[architecture(model)])
    with Client(address) as client:
        return client.generate(
            prompt, model=model, width=size[0], height=size[1], steps=steps, seed=seed, timeout=120, **options, **more
        )


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image.convert("RGB"))


def draw(address: str, steps: int = 4, seed: int = 7) -> str:
    """SHA-256 of a picture of "tiny"."""
    with Client(address) as client:
        return client.generate("a red fox", model="tiny", steps=steps, seed=seed, timeout=90).images[0].sha256


def idle(address: str) -> None:
    """Wait until nobody rides or waits."""
    with Client(address) as client:
        for _ in range(400):
            status = client.status()
            if not status.riding_count and not status.queued_count:
                return
            time.sleep(0.02)
    raise AssertionError(f"still busy: {status}")


def leased(stack: Stack) -> bool:
    """Whether the kernel says that somebody maps an arena."""
    locks = Path("/proc/locks").read_text()
    inodes = {file.stat().st_ino for file in stack.arena_dir.iterdir() if file.is_file() and file.name != "loader.lock"}
    return any(int(match) in inodes for match in re.findall(r":(\d+) 0 EOF", locks))
