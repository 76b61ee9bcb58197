"""Models and status for people and for programs, on stdout."""

import json
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from .board import size
from .display import clean
from .events import Finished, Image
from .replies import Model, Status

PIPE_WIDTH = 1000


def show_json(value: object) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def show_models(models: tuple[Model, ...]) -> None:
    """Print a line for each model."""
    table = _table("MODEL", "PIPELINE", "STATE", "READY", "SIZE", "ATTACHED")
    for each in models:
        state = f"{each.state}: {each.reason}" if each.reason else str(each.state)
        attached = "yes" if each.attached else "no"
        _add(table, each.name, each.pipeline_class, state, size(each.ready_bytes), size(each.size_bytes), attached)
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
