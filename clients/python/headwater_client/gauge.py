"""Shows on stderr how far a run is: a bar on a terminal, plain lines elsewhere, nothing if asked to be quiet."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import click
from rich.console import Console
from rich.live import Live
from rich.table import Column, Table

from .display import LINE_INTERVAL_S, bar, on_terminal
from .run import Run, Tell


def gauging(run: Run, quiet: bool) -> AbstractContextManager[Tell]:
    """Show a run; call what the context gives after each request."""
    if quiet:
        return nullcontext(lambda: None)
    return _bar(run) if on_terminal() else nullcontext(_Lines(run))


@contextmanager
def _bar(run: Run) -> Iterator[Tell]:
    live = Live(get_renderable=lambda: render(run), console=Console(stderr=True), refresh_per_second=10, transient=True)
    with live:
        yield lambda: None


def render(run: Run) -> Table:
    """One row; the bar gives way where the terminal is narrow."""
    grid = Table.grid(Column(no_wrap=True), Column(ratio=1), Column(no_wrap=True), Column(no_wrap=True), padding=(0, 1))
    grid.expand = True
    name, done, total = _where(run)
    grid.add_row(name, bar(done, total), f"{done}/{total}", _rate(run))
    return grid


def _where(run: Run) -> tuple[str, int, int]:
    if run.began:
        return "requests", len(run.samples), run.workload.request_count
    return "warm-up", len(run.warm_up), run.workload.warm_up_count


def _rate(run: Run) -> str:
    summary = run.summary()
    failed = sum(each.count for each in summary.failures)
    rate = summary.images_per_second
    parts = (f"{rate:.2f} pictures/s" if rate else "", f"{failed} failed" if failed else "")
    return ", ".join(part for part in parts if part)


class _Lines:
    """Plain lines: the first, the last, and now and then one between."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._told_s: dict[str, float] = {}

    def __call__(self) -> None:
        name, done, total = _where(self._run)
        now_s = time.monotonic()
        if done == total or now_s - self._told_s.get(name, 0) >= LINE_INTERVAL_S:
            self._told_s[name] = now_s
            click.echo(" ".join(filter(None, (f"{name} {done}/{total}", _rate(self._run)))), err=True)
