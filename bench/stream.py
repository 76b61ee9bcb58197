"""One denoise step of Z-Image's transformer: on the device, streamed, and as diffusers and accelerate offload it.

    python bench/stream.py --folder /tmp/z-image

Everything in one process and one run, eager. "Ours" is the engine and its ring over a real loader's arenas, with riders
that call the attached transformer; each output is compared bit for bit with plain diffusers' for that call alone. The
peers draw two calls as one batch and are compared with plain diffusers' batch. A step is timed from one mark on the
device's clock to another, without the first two of a run, the best of two runs.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench import checkpoint
from bench.common import Figures, copy_rate, pick_device, quiet_libraries, report, seconds, table, z_image_parser
from bench.riding import (
    LEAST_STEPS,
    UNLIMITED,
    Call,
    Log,
    Ride,
    attached_to,
    budget_for,
    denoiser_only,
    forward,
    new_ring,
    resident_share,
    ride,
    step_bytes,
)
from tests.sampler.inprocess import prepared
from tests.stack import Stack, running

Row = dict[str, Any]
PEERS = {
    "block": "group offload, block level",
    "leaf": "group offload, leaf level",
    "sequential": "sequential offload",
}
RESIDENT = "plain diffusers, resident"
SHARES = (0.25, 0.5, 0.75)


# ---- plain diffusers


def plain_ride(transformer: Any, calls: Sequence[Call], step_count: int, runs: int = 2) -> Ride:
    """`step_count` forwards of all calls as one batch; times are the best of `runs` after a short one."""
    device = calls[0].latents.device
    found = []

    def work(count: int, log: Log, outputs: list[list[torch.Tensor]]) -> None:
        for _ in range(count):
            outputs[:] = [[output] for output in forward(transformer, calls)]
            log.step_ended()

    with torch.inference_mode():
        for run in range(runs + 1):
            log, outputs = Log(device), list[list[torch.Tensor]]()
            wall_s = seconds(functools.partial(work, step_count if run else LEAST_STEPS, log, outputs), device)
            found.append(log.summary(1, wall_s))
            found[-1].outputs = outputs
    return min(found[1:], key=lambda each: each.step_ms)


def offload(transformer: Any, peer: str, device: torch.device) -> None:
    """Set one of the peers up on a transformer that lies in host memory."""
    if peer == "sequential":
        from accelerate import cpu_offload

        cpu_offload(transformer, device)
        return
    streams = {"use_stream": True, "record_stream": True} if device.type == "cuda" else {}
    kinds: dict[str, dict[str, Any]] = {
        "block": {"offload_type": "block_level", "num_blocks_per_group": 1},
        "leaf": {"offload_type": "leaf_level"},
    }
    transformer.enable_group_offload(onload_device=device, offload_device=torch.device("cpu"), **streams, **kinds[peer])


def remove_hooks(transformer: Any) -> None:
    """Undo a group offload; the params stay in host memory."""
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None:
            for name in list(registry.hooks):
                registry.remove_hook(name, recurse=False)


def plain_rows(calls: list[Call], transformer: Any, options: argparse.Namespace) -> Iterator[Row]:
    device = calls[0].latents.device
    transformer.to(device)
    for riders in (1, 2):
        yield row(RESIDENT, riders, plain_ride(transformer, calls[:riders], options.steps))
    for peer in options.peers:
        transformer.to("cpu")
        offload(transformer, peer, device)
        runs = 1 if peer == "sequential" else 2
        yield row(PEERS[peer], 2, plain_ride(transformer, calls, options.steps, runs))
        remove_hooks(transformer)


def row(name: str, riders: int, measured: Ride, **more: object) -> Row:
    times = {"step_ms": measured.step_ms, "wall_ms": measured.wall_ms}
    return {"what": name, "riders": riders, **times, "ride": measured, **more}


def stamped(rows: Iterable[Row], start: float) -> Iterator[Row]:
    """The rows, each with the second of the run in which it came."""
    for each in rows:
        yield each | {"at_s": time.perf_counter() - start}


# ---- ours


def our_rows(stack: Stack, calls: list[Call], options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Nothing resident, then all, then the shares between."""
    budgets: dict[str, int | None] = {"ours, nothing resident": None, "ours, resident": UNLIMITED}
    for name in list(budgets):
        with attached_to(stack, "m", new_ring(device, budgets[name]), options.tiny) as model:
            for riders in (1, 2):
                yield our_row(model, name, calls[:riders], options.steps)
            shares = {f"ours, {share:.0%} resident": budget_for(model, share) for share in SHARES}
    for name, budget in shares.items():
        with attached_to(stack, "m", new_ring(device, budget), options.tiny) as model:
            yield our_row(model, name, calls, options.steps)


def our_row(model: Any, name: str, calls: Sequence[Call], step_count: int) -> Row:
    measured = ride(model, calls, step_count)
    return row(
        name, len(calls), measured, step_bytes=step_bytes(model), counted_bytes=measured.streamed_bytes,
        resident_share=resident_share(model),
    )  # fmt: skip


# ---- what is claimed


def ratios(rows: list[Row], rate: float) -> Figures:
    """The claims, from the rows of this run."""

    def step(name: str, riders: int = 2) -> float | None:
        return next((r["step_ms"] for r in rows if r["what"] == name and r["riders"] == riders), None)

    def ratio(one: float | None, other: float | None) -> float | None:
        return one / other if one is not None and other else None

    streamed = next(r for r in rows if r["what"] == "ours, nothing resident" and r["riders"] == 2)
    # Small gates may stay in their slots from one step to the next: then less crosses the bus than the step needs.
    bus_ms = min(streamed["step_bytes"], streamed["counted_bytes"]) / rate * 1e3
    block = step("group offload, block level")
    floor_ms = max(bus_ms, step("ours, resident") or 0.0)
    return {
        "bus_ms": bus_ms,
        "floor_ms": floor_ms,
        "batch_of_two_ms": step(RESIDENT),
        "streamed_to_floor": ratio(streamed["step_ms"], floor_ms),
        "streamed_to_group_block": ratio(streamed["step_ms"], block),
        "half_resident_to_group_block": ratio(step("ours, 50% resident"), block),
        "streamed_to_batch_of_two": ratio(streamed["step_ms"], step(RESIDENT)),
        "resident_to_plain_one": ratio(step("ours, resident", 1), step(RESIDENT, 1)),
        "all_bit_equal": all(r["bit_equal"] for r in rows if r["what"].startswith("ours")),
    }


def measure(folder: Path, options: argparse.Namespace, device: torch.device) -> tuple[list[Row], Figures]:
    """All rows, and the claims."""
    start = time.perf_counter()
    rate = copy_rate(device, 1 << 20 if options.tiny else 1 << 30)
    with tempfile.TemporaryDirectory() as disk:
        model = denoiser_only(folder, Path(disk) / "m")
        with running(Path(disk), {"m": model}) as stack:
            stack.loader("--eager-load", extent_bytes="64KiB" if options.tiny else "64MiB")
            transformer = ZImageTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16)
            prepared(stack, "m")
            transformer.to(device)
            calls = [Call.of(seed, options.size, transformer, device) for seed in (1, 2)]
            with torch.inference_mode():
                references = [forward(transformer, [call])[0] for call in calls]
            rows = list(stamped(plain_rows(calls, transformer, options), start))
            del transformer
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            rows += stamped(our_rows(stack, calls, options, device), start)
    batch = next(r["ride"] for r in rows if r["what"] == RESIDENT and r["riders"] == 2)
    for each in rows:
        alone = each["riders"] == 1 or each["what"].startswith("ours")  # the peers draw both as one batch
        wanted = references[: each["riders"]] if alone else [outputs[0] for outputs in batch.outputs]
        each["bit_equal"] = each.pop("ride").equals(wanted)
    return rows, {"copy_rate_gb_s": rate / 1e9, **ratios(rows, rate)}


def main(arguments: list[str] | None = None) -> None:
    parser = z_image_parser(__doc__)
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 688), metavar="PX")
    parser.add_argument("--steps", type=int, default=9, help="at least 4")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    options = parser.parse_args(arguments)
    if options.tiny:
        options.size, options.steps = (64, 48), 4
    quiet_libraries()
    device = pick_device()
    with checkpoint.there("z-image", options.folder, options.tiny) as (folder, _):
        rows, figures = measure(folder, options, device)
    keys = ("at_s", "step_ms", "wall_ms", "step_bytes", "counted_bytes", "resident_share", "bit_equal")
    table(
        f"one step of Z-Image's transformer at {options.size[0]}x{options.size[1]}",
        ("", "riders", *keys),
        [(r["what"], r["riders"], *(r.get(key) for key in keys)) for r in rows],
    )
    table("ratios of this run", ("", ""), list(figures.items()))
    report("stream", device, {"size_px": list(options.size), "rows": rows, **figures})


if __name__ == "__main__":
    main()
