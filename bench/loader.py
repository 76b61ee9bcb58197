"""A loader at rest, and one that takes over from a dead one.

    python bench/loader.py --model sdxl --folder /tmp/sdxl

At rest: how soon it serves, what memory is its own beside the arenas, and what it computes while nobody asks. Then it
is killed and started again: until it serves, until all that it found is verified, and what it read from storage.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench import checkpoint
from bench.common import GIB, Figures, pick_device, report, table
from bench.disk import drop_page_cache, weights
from bench.process import cpu_s, own_bytes, storage_bytes
from bench.shapes import MODELS
from tests.sampler.inprocess import prepared
from tests.stack import Process, Stack, running


def started(stack: Stack, extent_bytes: str) -> tuple[Process, float]:
    start = time.perf_counter()
    return stack.loader(extent_bytes=extent_bytes), time.perf_counter() - start


def measure(folder: Path, rest_s: float, extent_bytes: str) -> Figures:
    with tempfile.TemporaryDirectory() as disk, running(Path(disk), {"m": folder}) as stack:
        loader, serving_s = started(stack, extent_bytes)
        prepared(stack, "m")
        time.sleep(min(1.0, rest_s))
        used = cpu_s(loader.pid)
        time.sleep(rest_s)
        used = cpu_s(loader.pid) - used
        own = own_bytes(loader.pid)
        loader.kill()
        drop_page_cache(folder)
        begin = time.perf_counter()
        second, again_s = started(stack, extent_bytes)
        prepared(stack, "m")
        verified_s = time.perf_counter() - begin
        size = sum(file.stat().st_size for file in weights(folder))
        return {
            "gib": size / GIB,
            "serving_s": serving_s,
            "idle_own_mib": own / (1 << 20),
            "idle_cpu_percent": 100 * used / rest_s,
            "restart_serving_s": again_s,
            "restart_verified_s": verified_s,
            "verified_gb_s": size / (verified_s - again_s) / 1e9,
            "restart_read_mib": storage_bytes(second.pid) / (1 << 20),
        }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sdxl")
    parser.add_argument("--folder", type=Path, help="written by bench/checkpoint.py; made if it is not there")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the code")
    parser.add_argument("--rest", type=float, default=20, help="seconds at rest")
    options = parser.parse_args(arguments)
    with checkpoint.there(options.model, options.folder, options.tiny) as (folder, _):
        figures = measure(folder, options.rest, "64KiB" if options.tiny else "64MiB")
    table("a loader", ("", ""), list(figures.items()))
    report("loader", pick_device(), figures)


if __name__ == "__main__":
    main()
