"""Plain diffusers on a folder, for comparison: everything on the device, or group offload of the whole pipeline.

    python bench/plain.py --folder /tmp/z-image --pictures /tmp/pictures.npz

A process of its own, so that what it allocates and pins is gone when it ends. Two pictures are asked for as one batch,
which is the fastest that the pipeline offers; the pictures to compare with are drawn one by one.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench.common import Figures, pick_device, quiet_libraries, report, seconds, synchronize, table


def draw(pipeline: Any, options: argparse.Namespace, seed: int, count: int = 1) -> np.ndarray:
    """Pictures as uint8, (count, height, width, 3)."""
    width, height = options.size
    images = pipeline(
        options.prompt, width=width, height=height, num_inference_steps=options.steps, guidance_scale=0.0,
        num_images_per_prompt=count, generator=torch.Generator().manual_seed(seed),
    ).images  # fmt: skip
    return np.stack([np.asarray(image) for image in images])


def group_offload(pipeline: Any, device: torch.device) -> None:
    """Block level for the transformer, leaf level for the rest, with streams: the fastest settings that were found."""
    streams = {"use_stream": True, "record_stream": True} if device.type == "cuda" else {}
    for name in ("transformer", "text_encoder", "vae"):
        blocks = {"offload_type": "block_level", "num_blocks_per_group": 1}
        kind = blocks if name == "transformer" else {"offload_type": "leaf_level"}
        apply_group_offloading(
            getattr(pipeline, name), onload_device=device, offload_device=torch.device("cpu"), **streams, **kind
        )


def measure(options: argparse.Namespace, device: torch.device) -> Figures:
    """Seconds for `count` pictures, resident and offloaded, and the allocator's peaks."""
    figures: Figures = {}
    pipeline: Any = DiffusionPipeline.from_pretrained(options.folder, torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)

    def timed(name: str) -> None:
        draw(pipeline, options, 0, options.count)
        reset_peak(device)
        figures[f"{name}_s"] = min(seconds(lambda: draw(pipeline, options, 0, options.count), device) for _ in range(2))
        figures[f"{name}_peak_bytes"] = peak(device)

    timed("resident")
    pictures = [draw(pipeline, options, options.seed + n)[0] for n in range(options.count)]
    one_by_one = [seconds(lambda n=n: draw(pipeline, options, n), device) for n in range(options.count)]  # type: ignore[misc]
    figures["resident_one_by_one_s"] = sum(one_by_one)
    np.savez(options.pictures, pictures=np.stack(pictures))
    start = time.perf_counter()
    pipeline.to("cpu")
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    group_offload(pipeline, device)
    synchronize(device)
    figures["group_offload_setup_s"] = time.perf_counter() - start
    timed("group_offload")
    return figures


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, required=True, help="where the pictures go, as an .npz")
    parser.add_argument("--prompt", default="a red fox in the snow")
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 688), metavar="PX")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--count", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1, help="of the first picture; the next ones count up")
    options = parser.parse_args(arguments)
    quiet_libraries()
    device = pick_device()
    figures = measure(options, device)
    table(f"plain diffusers, {options.count} pictures", ("", ""), list(figures.items()))
    report("plain", device, figures)


if __name__ == "__main__":
    main()
