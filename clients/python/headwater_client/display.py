"""Shows a board on stderr: bars on a terminal, plain lines elsewhere, nothing if asked to be quiet."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from .board import DONE, Board, Row, size
from .events import Event
from .replies import Preparation

# On a pipe, steps and bytes of a picture are told at most this often; changes of phase always.
LINE_INTERVAL_S = 5.0
PULSE_WIDTH = 20
ROW_LIMIT = 12

Show = Callable[[Event], None]
ShowPreparation = Callable[[Preparation], None]


def drawing(quiet: bool) -> AbstractContextManager[Show]:
    """Show a generate call; the events go into what the context gives."""
    if quiet:
        return nullcontext(lambda event: None)
    board = Board()
    return _bars(board) if on_terminal() else nullcontext(_Lines(board))


def preparing(quiet: bool) -> AbstractContextManager[ShowPreparation]:
    """Show a prepare call."""
    if quiet:
        return nullcontext(lambda event: None)
    return _byte_bar() if on_terminal() else nullcontext(_ByteLines())


def clean(text: str) -> str:
    """One line without control codes, whoever wrote it."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def on_terminal() -> bool:
    """Whether bars would be seen."""
    return Console(stderr=True).is_terminal


@contextmanager
def _bars(board: Board) -> Iterator[Show]:
    # The renderable is made anew at each refresh, so the rate and the pulse move without events.
    with Live(get_renderable=lambda: _render(board), console=Console(stderr=True), refresh_per_second=10) as live:
        try:
            yield board.add
        except BaseException:
            live.transient = not board.rows
            raise


def _render(board: Board) -> RenderableType:
    rows = sorted(board.rows.values(), key=lambda row: row.index)
    head = clean(board.heading)
    if len(rows) > ROW_LIMIT:
        done = sum(row.phase == DONE for row in rows)
        head += f" ({done} of {len(rows)} pictures done)"
        rows = [row for row in rows if row.phase != DONE][:ROW_LIMIT]
    return Group(Text(head, overflow="ellipsis", no_wrap=True), _grid(rows)) if rows else Text(head)


def _grid(rows: list[Row]) -> Table:
    columns = [Column(no_wrap=True), Column(no_wrap=True, min_width=9), Column(ratio=1)]
    columns += [Column(no_wrap=True, min_width=5, justify="right"), Column(no_wrap=True, min_width=11)]
    grid = Table.grid(*columns, padding=(0, 1))
    grid.expand = True
    for row in rows:
        grid.add_row(f"picture {row.index}", row.phase, bar(row.done, row.total), row.count, row.note)
    return grid


def bar(done: float, total: float | None) -> ProgressBar:
    """A bar; one without a total pulses."""
    return ProgressBar(total=total, completed=done, pulse=total is None, animation_time=time.monotonic())


class _Lines:
    """Plain lines: each change of heading or phase, and now and then how far a phase is."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._heading = ""
        self._phases: dict[int, str] = {}
        self._told_s: dict[int, float] = {}

    def __call__(self, event: Event) -> None:
        self._board.add(event)
        if self._board.heading != self._heading:
            self._heading = self._board.heading
            click.echo(clean(self._heading), err=True)
        for row in self._board.rows.values():
            if self._due(row):
                parts = (f"picture {row.index}:", row.phase, row.count, row.note)
                click.echo(" ".join(part for part in parts if part), err=True)

    def _due(self, row: Row) -> bool:
        now_s = time.monotonic()
        changed = self._phases.get(row.index) != row.phase
        if not changed and (row.phase == DONE or now_s - self._told_s[row.index] < LINE_INTERVAL_S):
            return False
        self._phases[row.index], self._told_s[row.index] = row.phase, now_s
        return True


@contextmanager
def _byte_bar() -> Iterator[ShowPreparation]:
    news: list[Preparation] = []
    with Live(get_renderable=lambda: _byte_row(news), console=Console(stderr=True), refresh_per_second=10) as live:
        try:
            yield lambda event: news.__setitem__(slice(None), [event])
        except BaseException:
            live.transient = not news
            raise


def _byte_row(news: list[Preparation]) -> RenderableType:
    if not news:
        return Text("connecting")
    event = news[0]
    grid = Table.grid(Column(no_wrap=True), Column(ratio=1), Column(no_wrap=True), padding=(0, 1))
    grid.expand = True
    grid.add_row(clean(event.model), bar(event.ready_bytes, event.total_bytes or None), _bytes(event))
    return grid


class _ByteLines:
    """Plain lines: the first, the last, and now and then one between."""

    def __init__(self) -> None:
        self._told_s: float | None = None

    def __call__(self, event: Preparation) -> None:
        now_s = time.monotonic()
        if self._told_s is None or event.done or now_s - self._told_s >= LINE_INTERVAL_S:
            self._told_s = now_s
            click.echo(f"{clean(event.model)}: {_bytes(event)}", err=True)


def _bytes(event: Preparation) -> str:
    parts = [f"{size(event.ready_bytes)} of {size(event.total_bytes)}"]
    if event.rate_bytes_per_second and not event.done:
        parts.append(f"{size(event.rate_bytes_per_second)}/s")
    if event.eta_s is not None and not event.done:
        parts.append(f"{event.eta_s:.0f} s left")
    return ", ".join(["ready", *parts] if event.done else parts)
