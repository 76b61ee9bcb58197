"""Many riders on one sweep, with nothing resident: what they cost together, and that none of them notices the others.

    python bench/sweep.py --folder /tmp/z-image

First Z-Image's transformer at 512x512, the engine in this process, with 1, 2, 4 and 8 riders. Then whole pipelines
over gRPC: four requests that differ in size, steps and prompt, each alone and all at once. Prompts of timed requests
are new to the sampler, so that the text encoder's sweep is in each figure.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench import checkpoint
from bench.common import Figures, note, pick_device, quiet_libraries, report, table, z_image_parser
from bench.riding import Arithmetic, Call, Log, attached_to, denoiser_only, new_ring, ride, ride_once, step_bytes
from bench.serving import Job, ask, ask_together, prepare, start_sampler
from services.sampler.model import AttachedModel
from tests.stack import Stack, running

RIDERS = (1, 2, 4, 8)
JOBS = (
    Job("a red fox in the snow", 1024, 688, 9, seed=1),
    Job("a lighthouse at dusk", 512, 512, 9, seed=2),
    Job("a bowl of plums on a table", 768, 512, 6, seed=3),
    Job("two birds", 640, 448, 9, seed=4),
)
TINY_JOBS = (
    Job("a red fox", 96, 64, 3, seed=1),
    Job("a lighthouse", 64, 64, 3, seed=2),
    Job("plums", 64, 48, 2, seed=3),
    Job("two birds", 48, 64, 3, seed=4),
)


def shared_steps(
    stack: Stack, options: argparse.Namespace, arithmetic: Arithmetic, device: torch.device
) -> tuple[list[Figures], Figures]:
    """A row for each number of riders, and the claims."""
    rows: list[dict[str, Any]] = []
    with attached_to(stack, "m", new_ring(device, None), options.tiny, arithmetic) as model:
        transformer = model.pipeline.transformer
        calls = [Call.of(seed, options.size, transformer, device) for seed in range(max(RIDERS))]
        alone = [one_step(model, call) for call in calls]
        for count in RIDERS:
            measured = ride(model, calls[:count], options.steps, runs=1)
            one_ms = rows[0]["step_ms"] if rows else measured.step_ms
            rows.append(
                {
                    "riders": count,
                    "step_ms": measured.step_ms,
                    "to_one_rider": measured.step_ms / one_ms,
                    "throughput_to_one_at_a_time": count * one_ms / measured.step_ms,
                    "streamed_bytes": measured.streamed_bytes,
                    "bit_equal_to_alone": measured.equals(alone[:count]),
                }
            )
        needed = step_bytes(model)
    by_count = {row["riders"]: row for row in rows}
    return rows, {
        "step_bytes": needed,
        "four_riders_to_one": by_count[4]["to_one_rider"],
        "eight_riders_throughput": by_count[8]["throughput_to_one_at_a_time"],
        "riders_bit_equal": all(row["bit_equal_to_alone"] for row in rows),
    }


def one_step(model: AttachedModel, call: Call) -> torch.Tensor:
    """The transformer's output for a call that rides alone."""
    outputs: list[list[torch.Tensor]] = [[]]
    ride_once(model, [call], 1, Log(call.latents.device), outputs)
    return outputs[0][0]


def whole_pipelines(
    stack: Stack, options: argparse.Namespace, arithmetic: Arithmetic, device: torch.device
) -> tuple[list[Figures], Figures]:
    """A row for each request, and the claims."""
    jobs = TINY_JOBS if options.tiny else JOBS
    flags = ("--no-stream-layers", "--riders", str(len(jobs)), *arithmetic.flags)
    address = start_sampler(stack, device, options.tiny, *flags).addresses[0]
    prepare(address)
    for job in jobs:  # each shape once: libraries choose their kernels, graphs and programs are made
        ask(address, job.take("warm"))
    alone = [ask(address, job.take("alone")) for job in jobs]
    # The claim is about the slowest: the better of two, as for all together.
    slowest = max(range(len(jobs)), key=lambda at: alone[at].seconds)
    alone[slowest] = min(alone[slowest], ask(address, jobs[slowest].take("slowest")), key=lambda a: a.seconds)
    runs = [ask_together([address], [job.take(f"all {n}") for job in jobs]) for n in range(2)]
    best = min(range(2), key=lambda n: runs[n][1])
    answers, all_s = runs[best]
    again = [ask(address, job.take(f"all {best}")).hashes for job in jobs]
    rows: list[Figures] = [
        {
            "size_px": f"{job.width_px}x{job.height_px}",
            "steps": job.step_count,
            "alone_s": one.seconds,
            "together_s": answer.seconds,
            "bit_equal_to_alone": answer.hashes == again[at],
        }
        for at, (job, one, answer) in enumerate(zip(jobs, alone, answers, strict=True))
    ]
    slowest_s = max(answer.seconds for answer in alone)
    return rows, {
        "all_at_once_s": all_s,
        "slowest_alone_s": slowest_s,
        "all_to_slowest_alone": all_s / slowest_s,
        "throughput_to_one_after_the_other": sum(answer.seconds for answer in alone) / all_s,
        "pictures_bit_equal": all(row["bit_equal_to_alone"] for row in rows),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = z_image_parser(__doc__)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar="PX")
    parser.add_argument("--steps", type=int, default=9, help="at least 4")
    parser.add_argument("--only", choices=("steps", "pipelines"), help="one of the two parts")
    parser.add_argument("--numerics", choices=("eager", "compiled"), default="eager")
    parser.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(arguments)
    if options.tiny:
        options.size, options.steps = (64, 48), 4
    quiet_libraries()
    device = pick_device()
    with checkpoint.there("z-image", options.folder, options.tiny) as (folder, disk):
        arithmetic = Arithmetic(options.cuda_graphs, disk / "cache" if options.numerics == "compiled" else None)
        models = {"m": denoiser_only(folder, disk / "m"), "z": folder}
        with running(disk, models) as stack:
            stack.loader("--eager-load", extent_bytes="64KiB" if options.tiny else "64MiB")
            steps, claims = (
                ([], {}) if options.only == "pipelines" else shared_steps(stack, options, arithmetic, device)
            )
            note("riders", claims)
            requests, more = (
                ([], {}) if options.only == "steps" else whole_pipelines(stack, options, arithmetic, device)
            )
    if steps:
        table(
            f"one step of Z-Image's transformer at {options.size[0]}x{options.size[1]}, nothing resident",
            list(steps[0]), [list(row.values()) for row in steps],
        )  # fmt: skip
    if requests:
        table("four requests over gRPC, nothing resident", list(requests[0]), [list(row.values()) for row in requests])
    table("ratios of this run", ("", ""), list((claims | more).items()))
    arithmetics = {"numerics": options.numerics, "cuda_graphs": options.cuda_graphs}
    report(
        "sweep",
        device,
        {"size_px": list(options.size), **arithmetics, "steps": steps, "requests": requests, **claims, **more},
    )


if __name__ == "__main__":
    main()
