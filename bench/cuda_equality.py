"""Where a picture on CUDA stops being bit-equal to plain diffusers: text encoders, denoiser, or autoencoder.

    python bench/cuda_equality.py [ARCHITECTURE ...]

For each tiny architecture of the tests, in float32 and half precision: plain diffusers against itself (again, on
another thread, in inference mode, with deterministic cuDNN), then the engine (resident, streamed) against plain, for
latents and for pixels. Prints one line each with the largest difference. Needs a CUDA device.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from services.sampler.model import AttachedModel
from services.sampler.requests import ImageRequest
from services.sampler.transfer import Ring
from tests.sampler.inprocess import attached, under_baton
from tests.stack import Stack, running
from tests.tiny_models import ARCHITECTURES, CALLS, write_folder

DEVICE = torch.device("cuda", 0)


def request(name: str) -> ImageRequest:
    options: dict[str, Any] = dict(CALLS[name])
    return ImageRequest(name, "a red fox", "r", width_px=64, height_px=64, step_count=3, seed=11, **options)


def plain(pipeline: Any, name: str, output: str) -> torch.Tensor:
    asked = request(name)
    result: torch.Tensor = pipeline(
        prompt=asked.prompt, width=64, height=64, num_inference_steps=3, output_type=output,
        generator=torch.Generator().manual_seed(11), **CALLS[name],
    ).images  # fmt: skip
    return result


@torch.inference_mode()
def draw(model: AttachedModel, name: str, output: str) -> torch.Tensor:
    """What a rider draws, before it becomes a picture."""
    model.bring_pinned()
    arguments = model.traits.call_arguments(model.traits.resolve(request(name)))
    generator = torch.Generator().manual_seed(11)
    result: torch.Tensor = model.request_view()(**arguments, generator=generator, output_type=output).images
    return result


def elsewhere(work: Callable[[], torch.Tensor]) -> torch.Tensor:
    box: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: box.append(work()))
    thread.start()
    thread.join()
    return box[0]


def say(what: str, one: torch.Tensor, other: torch.Tensor) -> None:
    print(
        f"  {what}: equal {torch.equal(one, other)}, off by {(one.float() - other.float()).abs().max():.3g}", flush=True
    )


def compare(name: str, dtype: torch.dtype, disk: Path) -> None:
    folder = write_folder(name, disk / name / str(dtype), dtype)
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    with running(disk / name, {name: folder}) as stack:
        stack.loader("--eager-load")
        for output in ("latent", "pt"):
            print(f"{name} {dtype} {output}")
            compare_output(stack, pipeline, name, output)


def compare_output(stack: Stack, pipeline: Any, name: str, output: str) -> None:
    reference = plain(pipeline, name, output)
    say("plain again", plain(pipeline, name, output), reference)
    say("plain, other thread", elsewhere(lambda: plain(pipeline, name, output)), reference)
    with torch.inference_mode():
        say("plain, inference mode", plain(pipeline, name, output), reference)
    for keep in (True, False):
        with attached(stack, name, Ring(DEVICE, 8 << 30, keep_residents=keep)) as model:
            drawn = under_baton(model.engine, functools.partial(draw, model, name, output))
            say(f"engine, {'resident' if keep else 'streamed'}", drawn, reference)


def main() -> None:
    for deterministic in (False, True):
        torch.backends.cudnn.deterministic = deterministic
        print(f"cudnn.deterministic = {deterministic}")
        for name in sys.argv[1:] or ARCHITECTURES:
            for dtype in (torch.float32, torch.float16):
                with tempfile.TemporaryDirectory() as disk:
                    (Path(disk) / name).mkdir()
                    compare(name, dtype, Path(disk))


if __name__ == "__main__":
    main()
