"""Says how far fills are: a bar on a terminal, elsewhere a line in the log every few seconds."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

import structlog

from services.loader.beside import beside
from services.loader.progress import RateMeter

LOOK_S = 0.2
LINE_S = 5.0

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Filling:
    """What is being filled now; no models: nothing is."""

    models: tuple[str, ...] = ()
    ready_bytes: int = 0
    total_bytes: int = 0


class Teller(Protocol):
    """Hears how one burst of fills goes on, and that it has ended."""

    def tell(self, now: Filling) -> None: ...
    def end(self) -> None: ...


class Lines:
    """A line every few seconds while bytes arrive."""

    def __init__(self) -> None:
        self._meter = RateMeter()
        self._told_s = time.monotonic()

    def tell(self, now: Filling) -> None:
        self._meter.add(now.ready_bytes)
        rate, time_s = self._meter.bytes_per_second, time.monotonic()
        if not rate or time_s - self._told_s < LINE_S:
            return
        self._told_s = time_s
        eta_s = self._meter.eta_s(now.total_bytes - now.ready_bytes)
        _log.info("filling", models=now.models, ready_bytes=now.ready_bytes, total_bytes=now.total_bytes,
                  bytes_per_second=rate, eta_s=round(eta_s or 0, 1))  # fmt: skip

    def end(self) -> None:
        """Each component says by itself that it is READY."""


class Bar:
    """A bar on the terminal that standard error is."""

    def __init__(self) -> None:
        from rich.console import Console  # only where there is a terminal: a loader should be small
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (TextColumn("{task.description}"), BarColumn(None), DownloadColumn(), TransferSpeedColumn(),
                   TimeRemainingColumn())  # fmt: skip
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True, expand=True)
        self._task = self._bar.add_task("")
        self._bar.start()

    def tell(self, now: Filling) -> None:
        text = ", ".join(now.models)
        self._bar.update(self._task, description=text, completed=now.ready_bytes, total=now.total_bytes)

    def end(self) -> None:
        self._bar.stop()


def telling(
    filling: Callable[[], Filling], new_teller: Callable[[], Teller], look_s: float = LOOK_S
) -> AbstractAsyncContextManager[None]:
    """Tell of fills inside the block; each burst has a teller of its own."""
    return beside(_tell(filling, new_teller, look_s))


async def _tell(filling: Callable[[], Filling], new_teller: Callable[[], Teller], look_s: float) -> None:
    teller: Teller | None = None
    try:
        while True:
            now = filling()
            if now.models:
                teller = teller or new_teller()
                teller.tell(now)
            elif teller:
                teller.end()
                teller = None
            await asyncio.sleep(look_s)
    finally:
        if teller:
            teller.end()


def teller_for(log_format: str) -> Callable[[], Teller]:
    return Bar if log_format == "text" and sys.stderr.isatty() else Lines
