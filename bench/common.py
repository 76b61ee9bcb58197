"""What every script of this folder needs: the machine's facts, a median, a table, and the line of JSON at the end."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import diffusers
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
GIB = 1 << 30
Figures = dict[str, object]


def quiet_libraries() -> None:
    """A script's output is its table: no bars, no hints, no look at a hub."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # Arenas are mapped read-only on purpose.
    warnings.filterwarnings("ignore", message="The given buffer is not writable")


def z_image_parser(doc: str | None) -> argparse.ArgumentParser:
    """The arguments of every script that measures Z-Image; `doc` is the script's own."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="written by bench/checkpoint.py; made if it is not there")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the code")
    return parser


def pick_device() -> torch.device:
    """The CUDA device that a run is about, or the CPU, on which figures mean nothing and only the code is tried."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> Figures:
    """What figures depend on."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        # A copy of the tree without its history is told the commit.
        "commit": os.environ.get("HEADWATER_COMMIT") or git.stdout.strip(),
    }


def report(script: str, device: torch.device, figures: Mapping[str, object]) -> None:
    """The last line of a script: everything it found, as JSON."""
    print(json.dumps({"script": script} | machine(device) | dict(figures)), flush=True)


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under a head, columns as wide as they need; numbers to the right."""
    cells = [[show(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    print(f"\n{title}")
    for row in cells:
        padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        padded[0] = row[0].ljust(widths[0])
        print("  ".join(["", *padded]).rstrip(), flush=True)


def note(stage: str, figures: Mapping[str, object]) -> None:
    """Say what a stage found as soon as it is known: a run that is cut short has shown that much."""
    print(f"{stage}: " + ", ".join(f"{key} {show(value)}" for key, value in figures.items()), flush=True)


def show(cell: object) -> str:
    """A figure for people: three digits and more of a float, yes and no for a claim."""
    if isinstance(cell, bool):
        return "yes" if cell else "NO"
    if isinstance(cell, float):
        return f"{cell:.1f}" if abs(cell) >= 100 else f"{cell:.3f}"
    return "-" if cell is None else str(cell)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of `work`, the device idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def copy_rate(device: torch.device, size_bytes: int, count: int = 9) -> float:
    """Bytes per second from pinned host memory to the device: the median of `count` copies of `size_bytes`."""
    cuda = device.type == "cuda"
    source = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=cuda).fill_(1)
    target = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    target.copy_(source)
    return size_bytes / statistics.median(
        seconds(lambda: target.copy_(source, non_blocking=True), device) for _ in range(count)
    )
