"""Models, status and measurements for people and for programs, on stdout."""

import json
from collections.abc import Mapping
from dataclasses import asdict, astuple
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from .board import size
from .display import clean
from .events import Finished, Image
from .measures import Spread, Summary
from .replies import Model, ModelDetails, Status, Task
from .run import Run

PIPE_WIDTH = 1000
LATENCIES = {
    "started": "until Started (queue)",
    "progress": "until first progress",
    "picture": "until first picture byte",
    "whole": "whole request",
}


def show_json(value: object) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def show_models(models: tuple[Model, ...]) -> None:
    """Print a line for each model."""
    table = _table("MODEL", "PIPELINE", "STATE", "READY", "SIZE", "ATTACHED", "TASKS")
    for each in models:
        state = f"{each.state}: {each.reason}" if each.reason else str(each.state)
        attached = "yes" if each.attached else "no"
        ready, whole = size(each.ready_bytes), size(each.size_bytes)
        _add(table, each.name, each.pipeline_class, state, ready, whole, attached, _tasks(each.tasks))
    _print(table)


def show_model(model: ModelDetails) -> None:
    """Print a line for each thing that there is to say."""
    table = _table("", "")
    table.show_header = False
    _add(table, "model", f"{model.summary.name} ({model.summary.pipeline_class})")
    _add(table, "tasks", _tasks(model.tasks))
    _add(table, "size", f"{model.default_width_px}x{model.default_height_px}, in {model.size_multiple_px} px")
    _add(table, "steps", str(model.default_step_count))
    _add(table, "guidance", _figure(model.default_guidance_scale, "g"))
    if model.max_reference_image_count:
        _add(table, "reference images", f"at most {model.max_reference_image_count}")
    _add(table, "strength", _figure(model.default_strength, ".4g"))
    _add(table, "strength to inpaint", _figure(model.default_inpaint_strength, ".4g"))
    _add(table, "solvers", ", ".join(model.solvers) or "its own")
    _add(table, "schedules", ", ".join(model.schedules) or "its own")
    _add(table, "takes", ", ".join(model.request_fields))
    for part in model.components:
        stays = f", {size(part.resident_bytes)} on the device" if part.resident_bytes else ""
        _add(
            table,
            part.name,
            f"{part.class_name}, {size(part.size_bytes)} in {part.dtype}, gates {part.gate_count}{stays}",
        )
        for line in part.outside:
            _add(table, "", f"a copy of its own: {line}")
    _print(table)


def show_status(status: Status) -> None:
    """Print a line for each thing that there is to say."""
    table = _table("", "")
    table.show_header = False
    _add(table, "replica", f"{status.replica} (headwater {status.version})")
    _add(table, "device", f"{status.device} {status.device_name}".strip())
    _add(table, "params reach it by", status.transfer or "nothing was sent yet")
    _add(table, "VRAM", _vram(status))
    _add(table, "pictures being drawn", str(status.riding_count))
    _add(table, "requests waiting", f"{status.queued_count} of at most {status.queue_limit}")
    _add(table, "up", f"{status.uptime_s:.0f} s")
    _add(table, "pictures drawn", str(status.image_count))
    _add(table, "streamed", size(status.streamed_bytes))
    _add(table, "attached models", ", ".join(status.attached_models) or "none")
    _add(table, "loader", "connected" if status.loader_connected else "does not answer")
    _print(table)


def generated(files: list[str], images: list[Image], finished: Finished) -> dict[str, Any]:
    """The JSON document of a generate call."""
    keys = ("image_index", "seed", "sha256", "width_px", "height_px", "format")
    pictures = [{key: getattr(image, key) for key in keys} for image in images]
    for picture, image, file in zip(pictures, images, files, strict=True):
        picture.update(file=file, size_bytes=len(image.data))
    return {"files": files, "images": pictures, **asdict(finished)}


def show_run(run: Run) -> None:
    """Print what was asked, what came of it, and how long it took."""
    summary = run.summary()
    table = _table("", "")
    table.show_header = False
    _add(table, "drawn", _drawn(summary))
    _add(table, "requests done", _done(run, summary))
    for each in summary.failures:
        _add(table, "requests failed", f"{each.count}, {f'{each.code} {each.reason}'.strip()}: {each.message}")
    _add(table, "warm-up", _warm_up(run))
    _add(table, "pictures", f"{summary.image_count} in {summary.elapsed_s:.1f} s")
    _add(table, "pictures per second", _figure(summary.images_per_second, ".2f"))
    _add(table, "steps per second", _figure(summary.steps_per_second, ".1f"))
    _add(table, "mean run time", _figure(summary.mean_run_time_s, ".3f", " s, by the server"))
    _add(table, "mean stall time", _figure(summary.mean_stall_time_s, ".3f", " s, by the server"))
    streamed = summary.streamed_bytes_per_image
    _add(table, "streamed per picture", "-" if streamed is None else size(streamed))
    _print(table)
    click.echo()
    _print(_latencies(summary.latencies_s))


def measured(run: Run) -> dict[str, Any]:
    """The JSON document of a run."""
    asked = run.workload
    return {
        "request_count": asked.request_count,
        "client_count": asked.client_count,
        "seed": asked.seed,
        "complete": run.complete,
        "warm_up": {"request_count": asked.warm_up_count, "failures": [asdict(each) for each in run.warm_up_failures]},
        **asdict(run.summary()),
    }


def _drawn(summary: Summary) -> str:
    used = summary.parameters
    if not used:
        return "nothing"
    return f"{used.get('model')}, {used.get('width')}x{used.get('height')}, {used.get('steps')} steps"


def _done(run: Run, summary: Summary) -> str:
    clients = f"{run.workload.client_count} client{'s' if run.workload.client_count != 1 else ''}"
    replicas = ", ".join(f"{count} on {name}" for name, count in summary.replica_counts.items())
    parts = [f"{summary.done_count} of {run.workload.request_count}", clients, replicas]
    return ", ".join(part for part in (*parts, "" if run.complete else "interrupted") if part)


def _warm_up(run: Run) -> str:
    parts = [f"{len(run.warm_up)} before, not counted"]
    parts += [f"{each.count} failed: {each.message}" for each in run.warm_up_failures]
    return ", ".join(parts)


def _tasks(tasks: tuple[Task, ...]) -> str:
    return ", ".join(str(task).replace("_", " ") for task in tasks) or "-"


def _figure(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _latencies(spreads: Mapping[str, Spread | None]) -> Table:
    table = _table("LATENCY, SECONDS", "P50", "P90", "P99", "MAX")
    for column in table.columns[1:]:
        column.justify = "right"
    for mark, words in LATENCIES.items():
        spread = spreads[mark]
        times = ("-",) * 4 if spread is None else tuple(f"{time_s:.3f}" for time_s in astuple(spread))
        _add(table, words, *times)
    return table


def _vram(status: Status) -> str:
    used = size(status.vram_used_bytes)
    return f"{used} of {size(status.vram_budget_bytes)}" if status.vram_budget_bytes else f"{used}, no budget"


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _add(table: Table, *cells: str) -> None:
    table.add_row(*(clean(cell).replace("[", r"\[") for cell in cells))


def _print(table: Table) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPE_WIDTH)
    with console.capture() as text:
        console.print(table)
    for line in text.get().splitlines():
        click.echo(line.rstrip())
