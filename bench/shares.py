"""Whole pictures with a share of the denoiser resident and the rest streamed, against everything resident.

    python bench/shares.py --model sdxl-bf16 --folder /tmp/sdxl
    python bench/shares.py --model z-image --size 1024 688 --steps 9

Two pictures at once, a rider each, on the engine in this process, eager, with CUDA graphs as a sampler has them unless
--no-cuda-graphs; prompt to pixels, the best of three after two that warm up. Prompts are new each time, so that text
encoders run, streamed too but in the last row. The goal is SDXL's: 1.10 with half of it resident.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench import checkpoint
from bench.common import Figures, note, pick_device, quiet_libraries, report, seconds, table, z_image_parser
from bench.riding import UNLIMITED, Arithmetic, attached_to, budget_for, new_ring
from bench.timeline import run
from services.sampler.model import AttachedModel
from services.sampler.requests import ImageRequest
from tests.stack import Stack, running

TAKES, WARM = 5, 2
GUIDANCE = {"z-image": 0.0}


def requests(options: argparse.Namespace, take: str) -> list[ImageRequest]:
    """Two pictures, seeds apart."""
    width, height = options.size
    return [
        ImageRequest(
            "m", f"a red fox in the snow, take {take:>5}", f"r{n}", width_px=width, height_px=height,
            step_count=options.steps, guidance_scale=GUIDANCE.get(options.model),
        )
        for n in range(2)
    ]  # fmt: skip


def drawn(model: AttachedModel, options: argparse.Namespace, device: torch.device) -> tuple[float, list[torch.Tensor]]:
    """(Seconds of two pictures, the last ones drawn)."""
    found: list[float] = []
    pictures: list[torch.Tensor] = []

    def draw(take: str) -> None:
        pictures[:] = run(model, requests(options, take), lambda name: None)

    for take in range(TAKES):
        found.append(seconds(functools.partial(draw, str(take)), device))
    return min(found[WARM:]), pictures


def rows(stack: Stack, options: argparse.Namespace, device: torch.device) -> list[Figures]:
    arithmetic = Arithmetic(options.cuda_graphs)
    with attached_to(stack, "m", new_ring(device, UNLIMITED), options.tiny, arithmetic) as model:
        budgets = {share: budget_for(model, share) for share in options.shares}
        all_s, wanted = drawn(model, options, device)
    found = []
    for share, budget in budgets.items():
        with attached_to(stack, "m", new_ring(device, budget), options.tiny, arithmetic) as model:
            took_s, pictures = drawn(model, options, device)
        equal = all(map(torch.equal, pictures, wanted))
        found.append({"resident": share, "seconds": took_s, "to_all_resident": took_s / all_s, "bit_equal": equal})
        note("shares", found[-1])
    return [*found, {"resident": "all", "seconds": all_s, "to_all_resident": 1.0, "bit_equal": True}]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = z_image_parser(__doc__)
    parser.add_argument("--model", choices=("z-image", "sdxl", "sdxl-bf16"), default="sdxl-bf16")
    parser.add_argument("--size", type=int, nargs=2, default=(1152, 896), metavar="PX")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--shares", type=float, nargs="+", default=(0.0, 0.5), help="of the denoiser, 0 to 1")
    parser.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(arguments)
    if options.tiny:
        options.size, options.steps = (64, 64), 2
    quiet_libraries()
    device = pick_device()
    with (
        checkpoint.there(options.model, options.folder, options.tiny) as (folder, disk),
        running(disk, {"m": folder}) as stack,
    ):
        stack.loader("--eager-load", extent_bytes="64KiB" if options.tiny else "64MiB")
        found = rows(stack, options, device)
    width, height = options.size
    title = f"two pictures of {options.model}, {width}x{height}, {options.steps} steps"
    table(title, list(found[0]), [list(row.values()) for row in found])
    report("shares", device, {"model": options.model, "size_px": [width, height], "rows": found})


if __name__ == "__main__":
    main()
