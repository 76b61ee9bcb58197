"""How fast packed weights become bf16, for each packing, beside a copy of as many bytes within the device.

    python bench/unpack.py
    python bench/unpack.py --packing Q8_0 Q4_K --slice-mib 4

GB of bf16 written in a second, the median of several rounds; `moved to copy` is all that is read and written in a
second, over what a plain copy reads and writes. The bytes are random, and on the device before the clock runs. On CUDA
most packings have kernels where Triton is installed; `--no-triton` shows what these are worth.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "gen")]

import torch

from bench.common import Figures, pick_device, report, seconds, table
from services.sampler.packed import BY_NAME, FP8, SLICE_BYTES, UNPACKERS, unpack, unpack_fp8

COLUMNS = 4096  # a row of a denoiser's matrix
MIB = 1 << 20


def rate(work: Callable[[], object], size_bytes: int, device: torch.device, rounds: int) -> float:
    """GB/s of so many bytes; a first round that allocates is not counted."""
    work()
    return size_bytes / statistics.median(seconds(work, device) for _ in range(rounds)) / 1e9


def work_of(packing: str, out: torch.Tensor, slice_bytes: int) -> Callable[[], object]:
    """Unpacks random bytes to `out`, bf16 of shape (rows, COLUMNS)."""
    shape = (len(out), COLUMNS)
    block, block_bytes = BY_NAME[packing][1:] if packing in BY_NAME else (1, 1)
    raw = torch.randint(256, (out.numel() // block * block_bytes,), dtype=torch.uint8, device=out.device)
    if packing in FP8:
        scale = torch.tensor(0.01)
        return lambda: unpack_fp8(raw, packing, shape, scale, out=out, slice_bytes=slice_bytes)
    return lambda: unpack(raw, packing, shape, out=out, slice_bytes=slice_bytes)


def measure(packings: Sequence[str], size_bytes: int, slice_bytes: int, rounds: int, device: torch.device) -> Figures:
    out = torch.zeros(size_bytes // (2 * COLUMNS), COLUMNS, dtype=torch.bfloat16, device=device)
    source = torch.zeros_like(out)
    written = out.numel() * 2
    copy = rate(lambda: out.copy_(source), written, device, rounds)
    rows: list[Figures] = []
    for packing in packings:
        gb_s = rate(work_of(packing, out, slice_bytes), written, device, rounds)
        _, block, block_bytes = BY_NAME.get(packing, (packing, 1, 1))
        moved = gb_s * (1 + block_bytes / block / 2)
        rows.append({"packing": packing, "gb_s": gb_s, "moved_to_copy": moved / (2 * copy)})
    return {"written_bytes": written, "slice_bytes": slice_bytes, "copy_gb_s": copy, "rows": rows}


def main(arguments: list[str] | None = None) -> None:
    known = [*UNPACKERS, *FP8]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packing", nargs="+", choices=known, default=known, help="those to measure")
    parser.add_argument("--mib", type=int, default=128, help="MiB of bf16 that a round writes")
    parser.add_argument("--slice-mib", type=float, default=SLICE_BYTES / MIB, help="MiB of float32 at a time")
    parser.add_argument("--no-triton", action="store_true", help="as where Triton is not installed")
    parser.add_argument("--tiny", action="store_true", help="a few rows, to try the code")
    options = parser.parse_args(arguments)
    size_bytes, rounds = (64 << 10, 2) if options.tiny else (options.mib * MIB, 5)
    device = pick_device()
    if options.no_triton:
        sys.modules["triton"] = None  # type: ignore[assignment]  # what imports it is told that there is none
    figures = measure(options.packing, size_bytes, int(options.slice_mib * MIB), rounds, device)
    rows = [list(row.values()) for row in figures["rows"]]  # type: ignore[attr-defined]
    table(f"unpacking; a copy writes {figures['copy_gb_s']:.1f} GB/s", ("packing", "GB/s", "moved to copy"), rows)
    report("unpack", device, {"triton": not options.no_triton} | figures)


if __name__ == "__main__":
    main()
