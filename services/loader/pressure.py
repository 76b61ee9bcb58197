"""Gives memory back while the host is short of it, before the kernel kills somebody.

Source of the figures: the kernel's pressure stall information (https://docs.kernel.org/accounting/psi.html). Of the
loader's own cgroup where it has one that says so, else of the whole host.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from pathlib import Path

import structlog

from services.loader.beside import beside

FILES = (Path("/sys/fs/cgroup/memory.pressure"), Path("/proc/pressure/memory"))
# The kernel renews its averages as often. What was given back shows in the average of ten seconds after some of these.
PERIOD_S = 2.0

_log = structlog.get_logger()


def stalled_percent(text: str) -> float:
    """Share of the last ten seconds in which some task waited for memory; 0 if the text does not say."""
    found = re.search(r"^some avg10=([0-9.]+)", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def relieving(
    give_back: Callable[[], Awaitable[int | None]],
    limit_percent: float,
    files: Sequence[Path] = FILES,
    period_s: float = PERIOD_S,
) -> AbstractAsyncContextManager[None]:
    """Call `give_back`, which tells the bytes, each period that the pressure is above the limit; 0 turns it off."""
    file = next((file for file in files if file.exists()), None)
    if file is None or not limit_percent:
        return nullcontext()
    return beside(_relieve(file, give_back, limit_percent, period_s))


async def _relieve(
    file: Path, give_back: Callable[[], Awaitable[int | None]], limit_percent: float, period_s: float
) -> None:
    told = False
    while True:
        await asyncio.sleep(period_s)
        with suppress(OSError):  # the next look may be luckier
            percent = stalled_percent(file.read_text())
            if percent < limit_percent:
                told = False
                continue
            freed_bytes = await give_back()
            if freed_bytes or not told:
                _log.warning("memory is short", stalled_percent=percent, given_back_bytes=freed_bytes or 0)
                told = True
