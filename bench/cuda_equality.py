"""Where a picture on CUDA stops being bit-equal to plain diffusers: text encoders, denoiser, or autoencoder.

    python bench/cuda_equality.py [ARCHITECTURE ...]

For each tiny architecture of the tests, in float32 and half precision: plain diffusers against itself (again, on
another thread, in inference mode, in a fresh process, with a cap on its memory), then the engine (resident, streamed)
against plain, for latents and for pixels. Prints one line each with the largest difference and, where the engine
differs, the first module whose output does. Needs a CUDA device.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from services.sampler.budget import Budget
from services.sampler.model import AttachedModel
from services.sampler.requests import ImageRequest
from services.sampler.ring import Ring
from tests.sampler.inprocess import attached, under_baton
from tests.stack import Stack, running
from tests.tiny_models import ARCHITECTURES, CALLS, write_folder

DEVICE = torch.device("cuda", 0)
PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "unet")
# What the tests' streaming sampler may use.
CAP = "torch.cuda.set_per_process_memory_fraction((4 << 30) / torch.cuda.mem_get_info()[1])"


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


Trace = list[tuple[str, torch.Tensor]]


@contextmanager
def traced(pipeline: Any) -> Iterator[Trace]:
    """Collects (module, output) of every module that is called, innermost first."""
    trace: Trace = []

    def note(name: str, module: object, args: object, output: object) -> None:
        found = output[0] if isinstance(output, tuple | list) else getattr(output, "last_hidden_state", output)
        if isinstance(found, torch.Tensor):
            trace.append((name, found.detach().cpu().clone()))

    hooks = [
        module.register_forward_hook(functools.partial(note, f"{part}.{name}"))
        for part in PARTS
        for name, module in getattr(getattr(pipeline, part, None), "named_modules", list)()
    ]
    try:
        yield trace
    finally:
        for hook in hooks:
            hook.remove()


def first_difference(one: Trace, other: Trace) -> str:
    for at, ((name, a), (other_name, b)) in enumerate(zip(one, other, strict=False)):
        if name != other_name:
            return f"call {at}: {name} here, {other_name} there"
        if not torch.equal(a, b):
            return f"call {at} of {len(one)}: {name} {tuple(a.shape)} off by {(a.float() - b.float()).abs().max():.3g}"
    return "no module's output"


def in_fresh_process(folder: Path, name: str, dtype: torch.dtype, output: str, prepare: str) -> torch.Tensor:
    """What plain diffusers draws in a process of its own, after the Python statement `prepare`."""
    with tempfile.NamedTemporaryFile() as file:
        code = (
            f"import torch; {prepare}; from bench.cuda_equality import plain, load; "
            f"torch.save(plain(load({str(folder)!r}, {dtype}), {name!r}, {output!r}).cpu(), {file.name!r})"
        )
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ)
        result: torch.Tensor = torch.load(file.name)
        return result.to(DEVICE)


def load(folder: str | Path, dtype: torch.dtype) -> Any:
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
    pipeline = load(folder, dtype)
    with running(disk / name, {name: folder}) as stack:
        stack.loader("--eager-load")
        for output in ("latent", "pt"):
            print(f"{name} {dtype} {output}")
            compare_output(stack, pipeline, name, output)
            for what, prepare in (("fresh process", "pass"), ("fresh process, capped", CAP)):
                fresh = in_fresh_process(folder, name, dtype, output, prepare)
                say(f"plain, {what}", fresh, plain(pipeline, name, output))


def compare_output(stack: Stack, pipeline: Any, name: str, output: str) -> None:
    with traced(pipeline) as wanted:
        reference = plain(pipeline, name, output)
    say("plain again", plain(pipeline, name, output), reference)
    say("plain, other thread", elsewhere(lambda: plain(pipeline, name, output)), reference)
    with torch.inference_mode():
        say("plain, inference mode", plain(pipeline, name, output), reference)
    for keep in (True, False):
        with attached(stack, name, Ring(DEVICE, Budget(8 << 30), keep_residents=keep)) as model:
            with traced(model.pipeline) as trace:
                drawn = under_baton(model.engine, functools.partial(draw, model, name, output))
            say(f"engine, {'resident' if keep else 'streamed'}", drawn, reference)
            if not torch.equal(drawn, reference):
                print("   ", first_difference(trace, wanted), flush=True)


def main() -> None:
    for tf32 in (True, False):  # torch's default for convolutions, and float32 proper
        torch.backends.cudnn.allow_tf32 = tf32
        print(f"cudnn.allow_tf32 = {tf32}")
        for name in sys.argv[1:] or ARCHITECTURES:
            for dtype in (torch.float32, torch.float16):
                with tempfile.TemporaryDirectory() as disk:
                    (Path(disk) / name).mkdir()
                    compare(name, dtype, Path(disk))


if __name__ == "__main__":
    main()
