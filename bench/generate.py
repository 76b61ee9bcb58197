"""Generate over gRPC with real processes: cold, warm, repeated, several clients, against plain diffusers.

    python bench/generate.py --folder /tmp/z-image --max-vram 11
    python bench/generate.py --folder /tmp/z-image --budgets 2 4 6 8 11 16 0

The first measures two pictures: on demand with the checkpoint's files dropped from the page cache (Python and its
libraries stay in it), then after an eager load; with the peak of the sampler's device memory as the driver counts it,
and the same pictures from plain diffusers, resident and with group offload. The second goes through VRAM budgets, in
GiB: what is refused and why, else the step time and the peak; and through the least budget that a refusal named.
Prompts of timed requests are new to the sampler, so that the text encoder's sweep is in each figure but `same_prompt`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from headwater_client import HeadwaterError
from headwater_client.events import Phase

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench import checkpoint
from bench.common import GIB, ROOT, Figures, note, pick_device, quiet_libraries, report, table, z_image_parser
from bench.disk import disk_rate, drop_page_cache, weights
from bench.riding import Arithmetic
from bench.serving import Answer, Job, ask, ask_together, prepare, start_sampler
from bench.vram import Peak, Watch
from tests.sampler.inprocess import prepared
from tests.stack import Stack, running

PROMPT = "a red fox in the snow"
NOISE = 1.03  # between two runs of the same step


# ---- the service


@contextmanager
def served(folder: Path, stage: str, logs: Path | None) -> Iterator[Stack]:
    """A stack over one folder as the model "z", with nothing started yet; its logs are kept in a folder."""
    with tempfile.TemporaryDirectory() as disk, running(Path(disk), {"z": folder}) as stack:
        try:
            yield stack
        finally:
            for log in Path(disk).glob("*.log") if logs else ():
                shutil.copy(log, logs / f"{stage}-{log.name}")


def flags(max_vram: str, options: argparse.Namespace) -> tuple[str, ...]:
    arithmetic = Arithmetic(options.cuda_graphs, options.compile_cache if options.numerics == "compiled" else None)
    return ("--max-vram", max_vram, "--riders", "8", *arithmetic.flags)


def cold(folder: Path, job: Job, options: argparse.Namespace, device: torch.device) -> tuple[Figures, Answer]:
    """On demand: nothing in memory, the first request makes the loader read. Then two that find all there."""
    drop_page_cache(folder)
    rate = disk_rate(weights(folder))
    with served(folder, "cold", options.logs) as stack:
        stack.loader(extent_bytes=options.extent_bytes)
        address = start_sampler(stack, device, options.tiny, *flags(options.max_vram, options)).addresses[0]
        dropped = drop_page_cache(folder)
        answer = ask(address, job)
        after_s = min(ask(address, job.take(f"after {n}")).seconds for n in range(2))
    size = sum(file.stat().st_size for file in weights(folder))
    return {
        "page_cache_dropped": dropped,
        "disk_gb_s": rate / 1e9,
        "cold_s": answer.seconds,
        "read_alone_s": size / rate,
        "after_cold_s": after_s,
        "cold_to_limit": answer.seconds / (1.10 * size / rate + after_s),
        **parts(answer, "cold"),
    }, answer


def warm(folder: Path, job: Job, options: argparse.Namespace, device: torch.device) -> tuple[Figures, list[Answer]]:
    """After an eager load: one client, four, and the same prompt again; peak memory over all of it."""
    with served(folder, "warm", options.logs) as stack:
        watch = Watch(device)
        stack.loader("--eager-load", extent_bytes=options.extent_bytes)
        start = time.perf_counter()
        prepared(stack, "z")
        fill_s = time.perf_counter() - start
        sampler = start_sampler(stack, device, options.tiny, *flags(options.max_vram, options))
        address = sampler.addresses[0]
        with watch.of(sampler.pid) as peak:
            prepare(address)
            ask(address, job.take("first"))
            two = min((ask(address, job.take(f"two {n}")) for n in range(2)), key=lambda a: a.seconds)
            first, again = ([replace(job.take(f"{t} {n}"), count=1, seed=n) for n in range(4)] for t in ("one", "two"))
            ask_together([address], first)
            four, four_s = ask_together([address], again)
            memo = same_prompt(address, replace(job, count=1))
            picture = ask(address, job)
            four_alone = [ask(address, each).hashes for each in again]
    return {
        "eager_fill_s": fill_s,
        "warm_s": two.seconds,
        "warm_streamed_bytes": two.finished.streamed_bytes,
        "warm_stall_s": two.finished.stall_time_s,
        **parts(two, "warm"),
        "four_clients_s": four_s,
        "four_clients_bit_equal": [a.hashes for a in four] == four_alone,
        **memo,
        **peak_figures(peak, options.max_vram),
    }, [picture, two]


def parts(answer: Answer, name: str) -> Figures:
    """Where a request's time went; of several pictures, the sum of theirs. Before: until it was admitted."""
    finished = answer.finished
    phases = {f"{name}_{phase.name.lower()}_s": seconds for phase, seconds in finished.phase_times_s.items()}
    return {f"{name}_before_s": answer.seconds - finished.run_time_s, f"{name}_run_s": finished.run_time_s} | phases


def same_prompt(address: str, job: Job) -> Figures:
    """A new prompt, then the same again: what the text encoders had to do with the second."""
    first = ask(address, job.take("memo"))
    second = ask(address, replace(job.take("memo"), seed=job.seed + 1))
    return {
        "new_prompt_s": first.seconds,
        "same_prompt_s": second.seconds,
        "new_prompt_bytes": first.finished.streamed_bytes,
        "same_prompt_bytes": second.finished.streamed_bytes,
        "text_encoder_bytes": first.finished.streamed_bytes - second.finished.streamed_bytes,
        # Bytes are counted gate by gate: who never entered the phase passed no gate of a text encoder.
        "same_prompt_encodes": Phase.ENCODING in second.finished.phase_times_s,
    }


def peak_figures(peak: Peak, max_vram: str) -> Figures:
    if peak.used_bytes is None:
        return {"peak_gib": None, "within_budget": None, "peak_of": ""}
    budget = float(max_vram)
    within = peak.used_bytes <= budget * GIB if budget > 0 else None
    return {"peak_gib": peak.used_bytes / GIB, "within_budget": within, "peak_of": peak.way}


# ---- against plain diffusers


def plain(folder: Path, job: Job) -> tuple[Figures, np.ndarray]:
    """Figures and pictures of bench/plain.py in a process of its own."""
    with tempfile.TemporaryDirectory() as disk:
        file = Path(disk) / "pictures.npz"
        size = (str(job.width_px), str(job.height_px))
        command = [sys.executable, str(ROOT / "bench" / "plain.py"), "--folder", str(folder), "--pictures", str(file)]
        command += ["--prompt", job.prompt, "--size", *size, "--steps", str(job.step_count), "--seed", str(job.seed)]
        path = os.pathsep.join(sys.path)
        run = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path}
        )
        if run.returncode:
            raise RuntimeError(run.stderr)
        figures = json.loads(run.stdout.splitlines()[-1])
        return {key: figures[key] for key in figures if key.endswith(("_s", "_bytes"))}, np.load(file)["pictures"]


def two_pictures(folder: Path, job: Job, options: argparse.Namespace, device: torch.device) -> Figures:
    """The whole comparison."""
    # Warm first: programs are compiled once for a folder of them, not at each cold start.
    more, (picture, _) = warm(folder, job, options, device)
    note("warm", more)
    figures, cold_answer = cold(folder, job, options, device)
    note("cold", figures)
    peers, references = plain(folder, job)
    note("plain", peers)
    figures |= more
    figures |= {f"plain_{key}": value for key, value in peers.items()}

    def number(key: str) -> float:
        value = figures[key]
        assert isinstance(value, float)
        return value

    drawn = [np.stack([np.asarray(image.pil) for image in answer.images]) for answer in (cold_answer, picture)]
    return figures | {
        "warm_to_group_offload": number("warm_s") / number("plain_group_offload_s"),
        "warm_to_resident": number("warm_s") / number("plain_resident_s"),
        "cold_to_limit": number("cold_s") / (1.10 * number("read_alone_s") + number("warm_s")),
        "eager_rate_to_disk_rate": number("read_alone_s") / number("eager_fill_s"),
        "cold_equals_warm": np.array_equal(*drawn),
        "bit_equal_to_plain": all(np.array_equal(one, references) for one in drawn),
        "largest_difference_to_plain": int(np.abs(drawn[0].astype(int) - references).max()),  # of 255
    }


# ---- budgets


def budgets(folder: Path, job: Job, options: argparse.Namespace, device: torch.device) -> list[Figures]:
    """A row for each budget, and for the least that a refusal named."""
    with served(folder, "budgets", options.logs) as stack:
        stack.loader("--eager-load", extent_bytes=options.extent_bytes)
        rows = [row_of(stack, budget, job, options, device) for budget in options.budgets]
        named = {str(row["least_gib"]) for row in rows if row["least_gib"]} - set(options.budgets)
        rows += [row_of(stack, budget, job, options, device) for budget in named]
    return sorted(rows, key=lambda row: float(str(row["max_vram_gib"])) or float("inf"))


def row_of(stack: Stack, budget: str, job: Job, options: argparse.Namespace, device: torch.device) -> Figures:
    """What a sampler with this budget says at its start or to its first request, else its figures."""
    watch = Watch(device)
    row: Figures = {"max_vram_gib": budget, "refused": "", "least_gib": "", "step_s": None, "two_pictures_s": None}
    try:
        sampler = start_sampler(stack, device, options.tiny, *flags(budget, options), "--attach", "z")
    except AssertionError as error:  # it ended, and this is its log
        return refused(row, str(error).strip().splitlines()[-1]) | peak_figures(Peak(), budget)
    with watch.of(sampler.pid) as peak:
        try:
            row |= at_budget(sampler.addresses[0], job)
        except HeadwaterError as error:
            row = refused(row, str(error))
    sampler.stop()
    row |= peak_figures(peak, budget)
    note("budget", row)
    return row


def refused(row: Figures, reason: str) -> Figures:
    """The row with the reason and the least budget that it names, if any."""
    least = re.search(r"--max-vram ([0-9.]+) is the least", reason)
    return row | {"refused": reason, "least_gib": least[1] if least else ""}


def budget_claims(rows: list[Figures]) -> Figures:
    """Whether no budget was exceeded, and whether more memory never made a step slower by more than the noise."""
    steps = [row["step_s"] for row in rows if isinstance(row["step_s"], float)]
    return {
        "never_exceeded": all(row["within_budget"] is not False for row in rows),
        "step_never_grows": all(more <= NOISE * less for less, more in itertools.pairwise(steps)),
        "refused": [row["max_vram_gib"] for row in rows if row["refused"]],
        "least_works": not {row["max_vram_gib"] for row in rows if row["refused"]} & {row["least_gib"] for row in rows},
    }


def at_budget(address: str, job: Job) -> Figures:
    """Seconds of the whole, and of one step: what the steps after the first add."""
    prepare(address)
    ask(address, job.take("first"))
    whole = min(ask(address, job.take(f"{n}")).seconds for n in range(2))
    one = min(ask(address, replace(job, step_count=1).take(f"one {n}")).seconds for n in range(2))
    return {"step_s": (whole - one) / (job.step_count - 1), "two_pictures_s": whole}


def main(arguments: list[str] | None = None) -> None:
    parser = z_image_parser(__doc__)
    parser.add_argument("--max-vram", default="11", metavar="GIB")
    parser.add_argument("--only", choices=("cold",), help="nothing but the cold start, and one that finds all there")
    parser.add_argument("--budgets", nargs="+", metavar="GIB", help="go through these instead; 0: all that is free")
    parser.add_argument("--numerics", choices=("eager", "compiled"), default="eager")
    parser.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--logs", type=Path, help="keep the services' logs in this folder")
    options = parser.parse_args(arguments)
    options.extent_bytes = "64KiB" if options.tiny else "64MiB"
    job = Job(PROMPT, 64, 48, 3, count=2) if options.tiny else Job(PROMPT, 1024, 688, 9, count=2)
    quiet_libraries()
    device = pick_device()
    with checkpoint.there("z-image", options.folder, options.tiny) as (folder, disk):
        options.compile_cache = disk / "cache"
        arithmetic = {"numerics": options.numerics, "cuda_graphs": options.cuda_graphs}
        if options.only:
            figures, _ = cold(folder, job, options, device)
            table("cold start", ("", ""), list(figures.items()))
            report("generate", device, {"max_vram_gib": options.max_vram, **arithmetic, **figures})
        elif options.budgets:
            rows = budgets(folder, replace(job, tiled_decode=None), options, device)
            table("VRAM budgets", list(rows[0]), [list(row.values()) for row in rows])
            claims = budget_claims(rows)
            table("of these", ("", ""), list(claims.items()))
            report("generate", device, {"budgets": rows, **claims})
        else:
            figures = two_pictures(folder, job, options, device)
            table(
                f"two pictures {job.width_px}x{job.height_px}, {job.step_count} steps", ("", ""), list(figures.items())
            )
            report("generate", device, {"max_vram_gib": options.max_vram, **arithmetic, **figures})


if __name__ == "__main__":
    main()
