"""An edit by Qwen-Image-Edit in Q8_0 over gRPC: one reference image, 20 steps, cfg 2.5, within a VRAM budget, warm.

    python bench/edit.py --folder /tmp/qwen --max-vram 11
    python bench/edit.py --folder /tmp/qwen --numerics compiled

Real processes, weights with random values at the published shapes (38 GB, written if they are not there). Prompts are
new to the sampler, so that its text encoder reads prompt and image each time. What a sweep of the denoiser brings is
told by two requests that differ in their steps, two sweeps a step; it should be the packed bytes that do not stay on
the device. stable-diffusion.cpp with --eager-load took 69.1 s for this work on an H200.
"""

from __future__ import annotations

import argparse
import io
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from headwater_client import Client
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench import checkpoint
from bench.common import GIB, Figures, note, pick_device, quiet_libraries, report, table
from bench.riding import Arithmetic
from bench.serving import Answer, Job, ask, prepare, start_sampler
from bench.vram import Watch
from tests.stack import Stack, running

GOAL_S, GOAL_BYTES = 18.0, 1.01
GATE_LIMIT = 512 << 20


def picture(width_px: int, height_px: int) -> bytes:
    """A PNG of smooth colours."""
    across, down = np.meshgrid(np.linspace(0, 255, width_px), np.linspace(0, 255, height_px))
    pixels = np.stack([across, down, 255 - across], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def measure(stack: Stack, job: Job, options: argparse.Namespace, device: torch.device, cache: Path) -> Figures:
    """A first request, then the best of several, then one of half the steps."""
    arithmetic = Arithmetic(compile_cache=cache if options.numerics == "compiled" else None)
    watch = Watch(device)
    sampler = start_sampler(stack, device, options.tiny, "--max-vram", options.max_vram, *arithmetic.flags)
    address = sampler.addresses[0]
    with watch.of(sampler.pid) as peak:
        note("attached", {"prepare_s": prepare(address)})
        first = ask(address, job.take("first"))
        note("first", {"seconds": first.seconds})
        answers = [ask(address, job.take(f"timed {n}")) for n in range(options.takes)]
        best = min(answers, key=lambda answer: answer.seconds)
        note("warm", {"seconds": best.seconds} | phases(best))
        few = ask(address, replace(job, step_count=job.step_count // 2).take("few"))
        again = ask(address, replace(job, step_count=job.step_count // 2).take("few"))
    with Client(address) as client:
        denoiser = next(c for c in client.model("z").components if c.name == "transformer")
    sweeps = 2 * (job.step_count - job.step_count // 2)
    sweep_bytes = (best.finished.streamed_bytes - few.finished.streamed_bytes) / sweeps
    left = denoiser.size_bytes - denoiser.resident_bytes
    return {
        "warm_s": best.seconds,
        "first_s": first.seconds,
        **phases(best),
        "packed_bytes": denoiser.size_bytes,
        "resident_bytes": denoiser.resident_bytes,
        "sweep_bytes": sweep_bytes,
        "sweep_to_left": sweep_bytes / left if left else None,
        "streamed_bytes": best.finished.streamed_bytes,
        "stall_s": best.finished.stall_time_s,
        "peak_gib": peak.used_bytes / GIB if peak.used_bytes is not None else None,
        "same_again": again.hashes == few.hashes,
    }


def phases(answer: Answer) -> Figures:
    return {f"{phase.name.lower()}_s": seconds for phase, seconds in answer.finished.phase_times_s.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="written by bench/checkpoint.py; made if it is not there")
    parser.add_argument("--max-vram", default="11", metavar="GIB")
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 688), metavar="PX", help="of picture and reference")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--takes", type=int, default=2)
    parser.add_argument("--numerics", choices=("eager", "compiled"), nargs="+", default=("eager",))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the code")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.size, options.steps = (64, 64), 2
    quiet_libraries()
    device = pick_device()
    width, height = options.size
    more = {"images": [picture(width, height)], "true_cfg_scale": 2.5, "negative_prompt": " "}
    job = Job("make the fox red", width, height, options.steps, more=more)
    rows: dict[str, Figures] = {}
    with (
        checkpoint.there("qwen-image-edit", options.folder, options.tiny, "q8_0") as (folder, disk),
        running(disk, {"z": folder}) as stack,
    ):
        with (disk / "models.toml").open("a") as file:
            file.write(f'[models.z.files]\ntransformer = "{folder / "qwen-image-edit-Q8_0.gguf"}"\n')
        stack.loader("--eager-load", extent_bytes="64KiB" if options.tiny else "64MiB")
        kinds = options.numerics
        for options.numerics in kinds:
            rows[options.numerics] = measure(stack, job, options, device, disk / "cache")
            stack.processes[-1].stop()
    for numerics, figures in rows.items():
        goals = {"warm_s": GOAL_S, "sweep_to_left": GOAL_BYTES}
        title = f"Qwen-Image-Edit Q8_0, {width}x{height}, {options.steps} steps, {numerics}"
        table(title, ("", "", "goal"), [(key, value, goals.get(key, "")) for key, value in figures.items()])
    report("edit", device, {"size_px": [width, height], "max_vram_gib": options.max_vram, **rows})


if __name__ == "__main__":
    main()
