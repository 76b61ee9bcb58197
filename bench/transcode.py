"""Weights packed as they are read: what that costs a fill, and what each type costs a picture.

    python bench/transcode.py
    python bench/transcode.py --model z-image --folder /tmp/z-image --types q8_0 --threads 16

A core: GB of bf16 that one thread packs in a second, here and by the gguf package. A fill: from when a loader with
`--eager-load` serves until all is READY, in GB of files a second; those with a type stand beside plain ones of the same
files, taking turns. The loss is the demo model's, for its weights are trained: the error of the matrices that a type
packs, over their size (root mean square), and its pictures' distance from those of the bf16 weights, in steps of 255.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "gen", "clients/python")]

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from headwater_client import Client
from numpy.typing import NDArray
from safetensors.torch import load_file

from bench import checkpoint
from bench.common import GIB, ROOT, Figures, note, pick_device, report, table
from bench.disk import drop_page_cache, weights
from bench.process import cpu_s
from bench.shapes import MODELS
from services.loader import packing
from services.loader.catalog import read_model
from services.loader.entries import ModelEntry
from services.loader.transcode import TypeRules
from tests.sampler.inprocess import prepared
from tests.stack import running

DEMO = ROOT / "models" / "demo"
TYPES = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
PLAIN = "plain"


# ---- a core


def core(types: Sequence[str], size_bytes: int) -> list[Figures]:
    """One thread's rates on numbers that are in memory."""
    numbers = np.random.default_rng(0).standard_normal(size_bytes // 2).astype(np.float32)
    held = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    numbers = (held.astype(np.uint32) << 16).view(np.float32)
    rows: list[Figures] = []
    for name in types:
        kind = Kind[name.upper()]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        out = memoryview(bytearray(held.size // block * block_bytes))
        packing.pack(memoryview(held).cast("B"), "BF16", kind.name, out)
        start = time.perf_counter()
        packing.pack(memoryview(held).cast("B"), "BF16", kind.name, out)
        here_s, start = time.perf_counter() - start, time.perf_counter()
        raw = gguf.quants.quantize(numbers.reshape(-1, 4096), kind)
        package_s = time.perf_counter() - start
        rows.append({
            "type": name, "gb_s": size_bytes / here_s / 1e9, "package_gb_s": size_bytes / package_s / 1e9,
            "equal": raw.tobytes() == bytes(out),
        })  # fmt: skip
    return rows


# ---- a fill


def fill(folder: Path, name: str, threads: int) -> Figures:
    """One eager load, plain or as a type, of files that are on disk only."""
    drop_page_cache(folder)
    size = sum(file.stat().st_size for file in weights(folder))
    with tempfile.TemporaryDirectory() as disk, running(Path(disk), {"m": folder}) as stack:
        if name != PLAIN:
            with (Path(disk) / "models.toml").open("a") as file:
                file.write(f'type = "{name}"\n')
        loader, start = stack.loader("--eager-load", "--fill-threads", str(threads), extent_bytes="64MiB"), time.time()
        model = prepared(stack, "m")
        seconds = time.time() - start
        arenas = sum(part.size_bytes for part in model.components)
        used_s = cpu_s(loader.pid)
    return {
        "as": name,
        "files_gb_s": size / seconds / 1e9,
        "seconds": seconds,
        "cpu_s": used_s,
        "memory": arenas / size,
    }


def fills(folder: Path, types: Sequence[str], threads: int, rounds: int) -> list[Figures]:
    """The median of some rounds, in each of which all take their turn."""
    runs: dict[str, list[Figures]] = {name: [] for name in (PLAIN, *types)}
    for _ in range(rounds):
        for name, done in runs.items():
            done.append(fill(folder, name, threads))
            note(f"filled as {name}", done[-1])
    rows = [
        {key: statistics.median(float(str(run[key])) for run in done) if key != "as" else name for key in done[0]}
        for name, done in runs.items()
    ]
    plain = float(str(rows[0]["files_gb_s"]))
    return [{**row, "to_plain": float(str(row["files_gb_s"])) / plain} for row in rows]


# ---- what is lost


def weight_error(name: str) -> Figures:
    """Root mean square of what a type takes from the demo's matrices, over that of the matrices; and how many bytes."""
    source = read_model(ModelEntry("demo", DEMO, types=TypeRules(name.upper())), 64 << 20)
    lost = whole = 0.0
    count = before = after = 0
    for part in source.components:
        tensors = {k: v for file in part.checkpoint.files for k, v in load_file(file.path).items()}
        for key, kind in part.transform.types.items():
            numbers = tensors[key].float().numpy()
            back = gguf.quants.dequantize(gguf.quants.quantize(numbers, Kind[kind]), Kind[kind])
            lost += float(np.square(back - numbers, dtype=np.float64).sum())
            whole += float(np.square(numbers, dtype=np.float64).sum())
            count += 1
        before += part.checkpoint.size_bytes
        after += sum(tensor.size_bytes for tensor in part.layout.tensors)
    return {"matrices": count, "weight_error": math.sqrt(lost / whole), "size": after / before}


def drawn(types: Sequence[str], prompts: Sequence[str]) -> dict[str, list[NDArray[np.float64]]]:
    """The demo's pictures, by type and with its weights as they are."""
    names = {PLAIN: "", **{name: f'type = "{name}"\n' for name in types}}
    with tempfile.TemporaryDirectory() as disk, running(Path(disk), {}) as stack:
        tables = (f'[models.{name}]\nfolder = "{DEMO}"\n{line}' for name, line in names.items())
        (Path(disk) / "models.toml").write_text("".join(tables))
        stack.loader()
        with Client(stack.sampler().addresses[0]) as client:
            return {
                name: [
                    np.asarray(client.generate(prompt, model=name, seed=7, timeout=120).images[0].pil, np.float64)
                    for prompt in prompts
                ]
                for name in names
            }


def losses(types: Sequence[str], prompts: Sequence[str]) -> list[Figures]:
    pictures = drawn(types, prompts)
    rows: list[Figures] = []
    for name in types:
        off = [np.abs(a - b) for a, b in zip(pictures[name], pictures[PLAIN], strict=True)]
        square = float(np.mean([np.square(each).mean() for each in off]))
        rows.append({
            "type": name, **weight_error(name),
            "pixel_max": max(float(each.max()) for each in off),
            "pixel_mean": float(np.mean([each.mean() for each in off])),
            "psnr_db": 10 * math.log10(255**2 / square) if square else None,
        })  # fmt: skip
    return rows


def show(title: str, rows: Sequence[Figures]) -> None:
    table(title, list(rows[0]), [list(row.values()) for row in rows])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="z-image")
    parser.add_argument("--folder", type=Path, help="written by bench/checkpoint.py; made if it is not there")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the code")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES)
    parser.add_argument("--threads", type=int, default=16, help="the loader's --fill-threads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=16, help="of the demo, by its held-out prompts; 0: no losses")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cores = core(options.types, (1 if options.tiny else 64) << 20)
    show("a core, GB of bf16 a second", cores)
    with checkpoint.there(options.model, options.folder, options.tiny) as (folder, _):
        size = sum(file.stat().st_size for file in weights(folder))
        filled = fills(folder, options.types, options.threads, options.rounds)
    show(f"fills of {size / GIB:.2f} GiB, {options.threads} threads", filled)
    prompts = (DEMO / "prompts_heldout.txt").read_text().splitlines()[: options.pictures]
    lost = losses(options.types, prompts) if prompts else []
    if lost:
        show(f"the demo, {len(prompts)} pictures", lost)
    figures = {"bytes": size, "threads": options.threads, "core": cores, "fills": filled, "losses": lost}
    report("transcode", pick_device(), figures)


if __name__ == "__main__":
    main()
