"""Draws when the bus and the riders were busy in one request, and in four at once, so that a stall can be seen.

    python bench/timeline.py --folder /tmp/z-image --output timeline
    python bench/timeline.py --model sdxl --folder /tmp/sdxl --output timeline-sdxl

Writes OUTPUT-1.png and OUTPUT-4.png, and OUTPUT-1.json and OUTPUT-4.json for chrome://tracing or ui.perfetto.dev, or
of other numbers of requests as --requests says. Whole
pipelines on the engine in this process, a warm run first; nothing resident unless --resident says which share of the
denoiser stays. On CUDA times are those of events on the copy stream and the compute stream.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench import checkpoint
from bench.common import Figures, machine, pick_device, quiet_libraries, report, synchronize, table, z_image_parser
from bench.riding import UNLIMITED, Arithmetic, Passage, all_at_once, attached_to, budget_for, new_ring
from bench.trace import BUS, Span, Trace, TracedRing, stalls, trace_riders
from services.sampler.model import AttachedModel
from services.sampler.requests import ImageRequest
from tests.stack import Stack, running

WIDTH, LEFT, TOP, LANE, GAP = 1800, 110, 64, 34, 12
COLOURS = {"text_encoder": "#7e57c2", "transformer": "#1e88e5", "vae": "#43a047", BUS: "#fb8c00"}
STALLS = {BUS: "#e53935", "host": "#fdd835"}
GUIDANCE = {"z-image": 0.0, "sdxl": None, "sdxl-bf16": None}  # by model; None: its own
SIZES = ((1024, 688), (512, 512), (768, 512), (640, 448))
TINY_SIZES = ((64, 48), (64, 64), (48, 64), (64, 48))


# ---- what is drawn: a run


def run(model: AttachedModel, requests: Sequence[ImageRequest], name: Callable[[str], None]) -> list[torch.Tensor]:
    """The pictures of all requests at once, a rider each, as pixels before they become files."""

    def draw(number: int) -> torch.Tensor:
        name(f"rider {number + 1}")
        try:
            with torch.inference_mode():
                model.bring_pinned()
                arguments = model.traits.call_arguments(model.traits.resolve(requests[number]))
                generator = torch.Generator().manual_seed(number)
                images: torch.Tensor = model.request_view()(**arguments, generator=generator, output_type="pt").images
                return images
        finally:
            name("")

    passages = [
        # Not exact: the engine only orders riders by it.
        Passage(
            functools.partial(draw, number), (asked.width_px, asked.height_px), functools.partial(int, asked.step_count)
        )
        for number, asked in enumerate(requests)
    ]
    return all_at_once(model, passages)


def traced(stack: Stack, counts: Sequence[int], options: argparse.Namespace) -> dict[int, list[Span]]:
    """Spans of a warm run for each number of riders."""
    device = pick_device()
    ring = new_ring(device, None, kind=TracedRing)
    if options.resident:
        with attached_to(stack, "z", new_ring(device, UNLIMITED), options.tiny) as model:
            budget = budget_for(model, options.resident)
        ring = new_ring(device, budget, kind=TracedRing)
    assert isinstance(ring, TracedRing)
    ring.trace = trace = Trace(device)
    sizes = TINY_SIZES if options.tiny else [options.size] * max(counts) if options.size else SIZES
    spans = {}
    with attached_to(stack, "z", ring, options.tiny, Arithmetic(options.cuda_graphs)) as model:
        name = trace_riders(model.engine, trace)
        for count in counts:
            for take in ("warm", "more", "drawn"):
                requests = [
                    ImageRequest(
                        "z", f"a fox, {take:>5} {n}", f"r{n}", width_px=sizes[n][0], height_px=sizes[n][1],
                        step_count=options.steps, guidance_scale=GUIDANCE[options.model],
                    )
                    for n in range(count)
                ]  # fmt: skip
                synchronize(device)
                trace.restart()
                run(model, requests, name)
                synchronize(device)
            spans[count] = trace.spans()
    return spans


# ---- how it is drawn


def tick_ms(total_ms: float) -> float:
    """A round distance of ticks, ten to twenty of them."""
    step = 10.0 ** len(str(int(total_ms))) / 100
    return next(step * n for n in (0.1, 0.2, 0.5, 1, 2, 5, 10) if total_ms / (step * n) <= 20)


def picture(title: str, spans: Sequence[Span], waits: Sequence[Span]) -> Image.Image:
    """Lanes over time: the bus, each rider, and where nobody computed."""
    lanes = [BUS, *sorted({span.lane for span in spans} - {BUS}), "stalls"]
    total = max(span.end_ms for span in spans)
    height = TOP + len(lanes) * (LANE + GAP) + 96
    image = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(image)
    font, large = ImageFont.load_default(14), ImageFont.load_default(20)
    scale = (WIDTH - LEFT - 24) / total
    bottom = TOP + len(lanes) * (LANE + GAP) + 12  # room for the longest stall's name
    draw.text((LEFT, 16), title, "black", large)
    step = tick_ms(total)
    for n in range(int(total / step) + 1):
        x = LEFT + n * step * scale
        draw.line((x, TOP - 6, x, bottom), "#e0e0e0")
        draw.text((x, bottom + 4), f"{n * step:g}", "#424242", font, anchor="ma")
    draw.text((WIDTH - 24, bottom + 22), "ms", "#424242", font, anchor="ra")
    for number, lane in enumerate(lanes):
        y = TOP + number * (LANE + GAP)
        draw.text((LEFT - 10, y + LANE / 2), lane, "black", font, anchor="rm")
        for span in waits if lane == "stalls" else (s for s in spans if s.lane == lane):
            colour = STALLS[span.lane] if lane == "stalls" else COLOURS[BUS if lane == BUS else part(span)]
            x0, x1 = LEFT + span.start_ms * scale, LEFT + span.end_ms * scale
            draw.rectangle((x0, y, max(x0, x1 - 1), y + LANE), colour)
            if x1 - x0 > 3:  # the seam between neighbours
                draw.line((x0, y, x0, y + LANE), "white")
    if waits:
        longest = max(waits, key=lambda span: span.duration_ms)
        x, y = LEFT + (longest.start_ms + longest.end_ms) / 2 * scale, TOP + (len(lanes) - 1) * (LANE + GAP) + LANE
        anchor = "ra" if x > WIDTH / 2 else "la"
        draw.text(
            (x, y), f"longest: {longest.duration_ms:.2f} ms before {longest.name}", "#b71c1c", font, anchor=anchor
        )
    legend = {"copy to the device": COLOURS[BUS], "text encoder": COLOURS["text_encoder"]}
    legend |= {"denoiser": COLOURS["transformer"], "autoencoder": COLOURS["vae"]}
    legend |= {"nobody computes, a copy is under way": STALLS[BUS], "nobody computes, the bus rests": STALLS["host"]}
    x = float(LEFT)
    for text, colour in legend.items():
        draw.rectangle((x, bottom + 50, x + 14, bottom + 64), colour)
        draw.text((x + 20, bottom + 49), text, "black", font)
        x += 50 + draw.textlength(text, font)
    return image


def part(span: Span) -> str:
    component = span.name.split(".")[0]
    return next((known for known in COLOURS if component.startswith(known)), "transformer")


def events(spans: Sequence[Span], waits: Sequence[Span]) -> list[dict[str, object]]:
    """Chrome's trace events: complete events in microseconds, one thread for each lane."""
    lanes = [BUS, *sorted({span.lane for span in spans} - {BUS}), "stalls"]
    names = [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": n, "args": {"name": lane}} for n, lane in enumerate(lanes)
    ]
    return names + [
        {
            "ph": "X",
            "name": span.name,
            "cat": lane,
            "pid": 1,
            "tid": lanes.index(lane),
            "ts": span.start_ms * 1e3,
            "dur": span.duration_ms * 1e3,
            "args": {"size_bytes": span.size_bytes},
        }
        for lane, span in [*((s.lane, s) for s in spans), *(("stalls", w) for w in waits)]
    ]


def write(output: Path, title: str, spans: Sequence[Span], at_least_ms: float) -> Figures:
    """The PNG and the JSON of a run, and its figures."""
    waits = stalls(list(spans), at_least_ms)
    picture(title, spans, waits).save(output.with_suffix(".png"))
    output.with_suffix(".json").write_text(json.dumps({"traceEvents": events(spans, waits)}))
    copies = [span for span in spans if span.lane == BUS]
    busy_ms = sum(span.duration_ms for span in copies)
    streamed = [span for span in copies if span.duration_ms > 0]
    return {
        "total_ms": max(span.end_ms for span in spans),
        "bus_busy_ms": busy_ms,
        "bus_gb_s": sum(span.size_bytes for span in streamed) / busy_ms / 1e6 if busy_ms else None,
        "compute_ms": sum(span.duration_ms for span in spans if span.lane != BUS),
        "stalled_for_copies_ms": sum(wait.duration_ms for wait in waits if wait.lane == BUS),
        "stalled_otherwise_ms": sum(wait.duration_ms for wait in waits if wait.lane != BUS),
        "longest_stall_ms": max((wait.duration_ms for wait in waits), default=0.0),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = z_image_parser(__doc__)
    parser.add_argument("--model", choices=GUIDANCE, default="z-image")
    parser.add_argument("--output", type=Path, default=Path("timeline"), help="start of the files' names")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--requests", type=int, nargs="+", default=(1, 4), help="at once, at most 4")
    parser.add_argument("--size", type=int, nargs=2, metavar="PX", help="of all requests (default: of each its own)")
    parser.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--resident", type=float, default=0.0, metavar="SHARE", help="of the denoiser, 0 to 1")
    options = parser.parse_args(arguments)
    quiet_libraries()
    device = pick_device()
    with (
        checkpoint.there(options.model, options.folder, options.tiny) as (folder, disk),
        running(disk, {"z": folder}) as stack,
    ):
        stack.loader("--eager-load", extent_bytes="64KiB" if options.tiny else "64MiB")
        traces = traced(stack, options.requests, options)
    figures: dict[str, Figures] = {}
    for count, spans in traces.items():
        what = f"{count} request{'s' if count > 1 else ''}, {options.model}, {options.steps} steps"
        kept = f"{options.resident:.0%} of the denoiser resident" if options.resident else "nothing resident"
        title = f"{what}, {kept}, {machine(device)['device']}"
        output = options.output.with_name(f"{options.output.name}-{count}")
        figures[str(count)] = write(output, title, spans, at_least_ms=0.05)
    rows = [(count, *found.values()) for count, found in figures.items()]
    table("timeline", ("requests", *next(iter(figures.values()))), rows)
    report("timeline", device, {"model": options.model, "resident_share": options.resident, "requests": figures})


if __name__ == "__main__":
    main()
