"""One, two, three samplers on one loader: host memory, how soon a further one draws, and what they draw together.

    python bench/replicas.py --folder /tmp/z-image --max-vram 11

Host memory is each process's PSS (/proc/PID/smaps_rollup), in which a shared page counts once over all its sharers;
`own` is what of it no file stands behind. A sampler's start is cut: its process until it serves, which is mostly
imports; attaching; and from the start of attaching until the first picture's first sweep, the text encoder's, begins
and ends, and until its first denoise step has ended. Throughput is of all samplers on one device.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from headwater_client import Client
from headwater_client.events import Phase, Progress

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench import checkpoint
from bench.common import GIB, Figures, pick_device, quiet_libraries, report, table, z_image_parser
from bench.process import pss
from bench.serving import Job, ask, ask_together, prepare, start_sampler
from tests.stack import Process, Stack, running

ALLOWED_EACH_BYTES = 3 * GIB // 2


def first_sweeps_s(address: str, job: Job) -> Figures:
    """Seconds from the start of attaching until each of these."""
    seconds: Figures = {}

    def now(what: str) -> None:
        seconds.setdefault(what, time.perf_counter() - start)

    with Client(address) as client:
        start = time.perf_counter()
        client.model(job.model, timeout=300)
        now("attached_s")
        for event in client.stream(
            job.prompt, model=job.model, width=job.width_px, height=job.height_px, steps=1, guidance_scale=0.0, seed=1
        ):
            if isinstance(event, Progress) and event.phase is Phase.ENCODING:
                now("sweep_begins_s")
            if isinstance(event, Progress) and event.phase is Phase.DENOISING:
                now("sweep_ends_s")
                if event.step == 1:
                    now("first_step_ends_s")
    return seconds


def replicas(stack: Stack, job: Job, options: argparse.Namespace, device: torch.device) -> list[Figures]:
    """A row for each number of samplers."""
    loader = stack.loader("--eager-load", extent_bytes="64KiB" if options.tiny else "64MiB")
    samplers: list[Process] = []
    rows: list[Figures] = []
    pictures: set[str] = set()
    for count in range(1, options.count + 1):
        start = time.perf_counter()
        samplers.append(start_sampler(stack, device, options.tiny, "--max-vram", options.max_vram))
        serving_s = time.perf_counter() - start
        address = samplers[-1].addresses[0]
        if count == 1:  # the first waits for the disk; the further ones find all in memory
            prepare(address)
        start_figures = first_sweeps_s(address, job.take("first"))
        pictures.update(ask(address, job).hashes)
        addresses = [sampler.addresses[0] for sampler in samplers]
        jobs = [replace(job.take(f"{count} {n}"), seed=n) for n in range(4 * count)]
        _, together_s = ask_together(addresses, jobs)
        arenas = sum(file.stat().st_blocks * 512 for file in stack.arena_dir.glob("*") if file.is_file())
        shares = [pss(process.pid) for process in (loader, *samplers)]
        rows.append(
            {
                "samplers": count,
                "serving_s": serving_s,
                **start_figures,
                "pictures_per_s": len(jobs) / together_s,
                "arenas_gib": arenas / GIB,
                "loader_pss_gib": shares[0] / GIB,
                "samplers_pss_gib": sum(shares[1:]) / GIB,
                "samplers_own_gib": sum(pss(sampler.pid, "Pss_Anon") for sampler in samplers) / GIB,
                "samplers_files_gib": sum(pss(sampler.pid, "Pss_File") for sampler in samplers) / GIB,
                "within_limit": sum(shares) <= 1.02 * arenas + count * ALLOWED_EACH_BYTES,
                "same_picture": len(pictures) == 1,
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = z_image_parser(__doc__)
    parser.add_argument("--max-vram", default="11", metavar="GIB", help="of each sampler")
    parser.add_argument("--count", type=int, default=3, help="samplers at most")
    options = parser.parse_args(arguments)
    job = Job("a red fox in the snow", 64, 48, 3) if options.tiny else Job("a red fox in the snow", 1024, 688, 9)
    quiet_libraries()
    device = pick_device()
    with (
        checkpoint.there("z-image", options.folder, options.tiny) as (folder, disk),
        running(disk, {"z": folder}) as stack,
    ):
        rows = replicas(stack, job, options, device)
    table("samplers on one loader", list(rows[0]), [list(row.values()) for row in rows])
    report("replicas", device, {"max_vram_gib": options.max_vram, "replicas": rows})


if __name__ == "__main__":
    main()
