"""Many requests on one sampler: mixed sizes, some cancelled, some too large for the budget. Does anything grow?

    python bench/soak.py --folder /tmp/z-image --max-vram 8

Eight clients send 200 requests. At rest, after each quarter: the sampler's own host memory (anonymous, which leaves the
arenas out), its device memory by the driver's count, its threads and open files. The first quarter warms up; what comes
later should be flat. Then every finished request is asked for again, one at a time, and its pictures compared.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from headwater_client import Client, HeadwaterError
from headwater_client.events import Phase, Progress

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench import checkpoint
from bench.common import Figures, pick_device, quiet_libraries, report, table, z_image_parser
from bench.serving import Job, ask, prepare, start_sampler
from bench.vram import Watch
from tests.stack import running

CLIENTS, QUARTERS = 8, 4
SIZES = ((512, 512), (640, 448), (768, 512), (1024, 688), (448, 640))
TINY_SIZES = ((64, 48), (64, 64), (48, 64), (96, 64))
# Within the protocol's limits, and more than 8 GiB for the autoencoder alone.
TOO_LARGE = (4096, 4096)
CANCELLED_SHARE, TOO_LARGE_SHARE = 0.15, 0.05


@dataclass
class Case:
    """One request, what is to happen to it, and what did: "finished", "cancelled", or an error's reason."""

    job: Job
    kind: str  # finish, cancel, too large
    outcome: str = ""
    hashes: tuple[str, ...] = ()


def cases(count: int, tiny: bool, over_budget: bool) -> list[Case]:
    """Seeded."""
    chance = random.Random(0)
    sizes = TINY_SIZES if tiny else SIZES
    made = []
    for number in range(count):
        lot = chance.random()
        kind = "cancel" if lot < CANCELLED_SHARE else "finish"
        if over_budget and lot > 1 - TOO_LARGE_SHARE:
            kind = "too large"
        width, height = TOO_LARGE if kind == "too large" else chance.choice(sizes)
        steps = 1 if kind == "too large" else chance.randint(2, 4)
        prompt = f"{chance.choice(('a red fox', 'a lighthouse', 'plums', 'two birds'))}, take {chance.randrange(40)}"
        made.append(Case(Job(prompt, width, height, steps, seed=number, count=chance.choice((1, 1, 2))), kind))
    return made


def carry_out(address: str, case: Case) -> None:
    """Send a case's request and note what became of it."""
    try:
        if case.kind == "cancel":
            cancel_under_way(address, case.job)
            case.outcome = "cancelled"
        else:
            case.hashes = ask(address, case.job).hashes
            case.outcome = "finished"
    except HeadwaterError as error:
        case.outcome = error.reason or error.code


def cancel_under_way(address: str, job: Job) -> None:
    """Leave a request when its denoising begins."""
    with Client(address) as client:
        events = client.stream(
            job.prompt, model=job.model, width=job.width_px, height=job.height_px, steps=job.step_count,
            guidance_scale=0.0, seed=job.seed, count=job.count,
        )  # fmt: skip
        for event in events:
            if isinstance(event, Progress) and event.phase is Phase.DENOISING:
                break
        events.close()


def at_rest(address: str, process: psutil.Process, watch: Watch, after: int) -> Figures:
    """What the sampler holds when nobody rides."""
    with Client(address) as client:
        while (status := client.status()).riding_count or status.queued_count:
            time.sleep(0.05)
    memory = process.memory_info()
    used = watch.used(process.pid).used_bytes
    return {
        "after": after,
        "host_mib": (memory.rss - memory.shared) / 2**20,
        "device_mib": used / 2**20 if used is not None else None,
        "threads": process.num_threads(),
        "open_files": process.num_fds(),
    }


def soak(address: str, pid: int, watch: Watch, made: Sequence[Case]) -> list[Figures]:
    """Carry all cases out, some at a time; what the sampler holds before and after each quarter."""
    process = psutil.Process(pid)
    rows = [at_rest(address, process, watch, 0)]
    quarter = -(-len(made) // QUARTERS)
    for start in range(0, len(made), quarter):
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(lambda case: carry_out(address, case), made[start : start + quarter]))
        rows.append(at_rest(address, process, watch, min(start + quarter, len(made))))
    return rows


def grown(rows: Sequence[Figures], key: str) -> float | None:
    """How much more there was at the end than after the first quarter."""
    first, last = rows[1][key], rows[-1][key]
    return last - first if isinstance(first, int | float) and isinstance(last, int | float) else None


def measure(folder: Path, disk: Path, options: argparse.Namespace, device: torch.device) -> Figures:
    made = cases(options.count, options.tiny, over_budget=device.type == "cuda")
    with running(disk, {"z": folder}) as stack:
        watch = Watch(device)
        stack.loader("--eager-load", extent_bytes="64KiB" if options.tiny else "64MiB")
        sampler = start_sampler(stack, device, options.tiny, "--max-vram", options.max_vram)
        address = sampler.addresses[0]
        prepare(address)
        with watch.of(sampler.pid) as peak:
            start = time.perf_counter()
            rows = soak(address, sampler.pid, watch, made)
            seconds = time.perf_counter() - start
        finished = [case for case in made if case.outcome == "finished"]
        equal = [ask(address, case.job).hashes == case.hashes for case in finished]
    table("the sampler at rest", list(rows[0]), [list(row.values()) for row in rows])
    return {
        "at_rest": rows,
        "seconds": seconds,
        "outcomes": {
            f"{kind}: {outcome}": n for (kind, outcome), n in Counter((c.kind, c.outcome) for c in made).items()
        },
        "peak_mib": peak.used_bytes / 2**20 if peak.used_bytes is not None else None,
        "host_grew_mib": grown(rows, "host_mib"),
        "device_grew_mib": grown(rows, "device_mib"),
        "threads_grew": grown(rows, "threads"),
        "open_files_grew": grown(rows, "open_files"),
        "rerun_count": len(equal),
        "rerun_bit_equal": all(equal),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = z_image_parser(__doc__)
    parser.add_argument("--max-vram", default="8", metavar="GIB")
    parser.add_argument("--count", type=int, default=200, help="requests")
    options = parser.parse_args(arguments)
    quiet_libraries()
    device = pick_device()
    with checkpoint.there("z-image", options.folder, options.tiny) as (folder, disk):
        figures = measure(folder, disk, options, device)
    table(f"{options.count} requests", ("", ""), [(k, v) for k, v in figures.items() if k != "at_rest"])
    report("soak", device, {"max_vram_gib": options.max_vram, **figures})


if __name__ == "__main__":
    main()
