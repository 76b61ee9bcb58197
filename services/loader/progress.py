"""How a fill goes: who wakes when something changed, how fast bytes arrive, and what a waiting caller hears."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress

from services.errors import ShuttingDown
from services.loader.records import ModelView, Part, Progress
from services.params.arena import ExtentState

_WINDOW_S = 1.5
_BEAT_S = 1.0


class Changes:
    """Wakes all who wait when something changed. Waiters name the version they know, so that no change is missed."""

    def __init__(self) -> None:
        self.version = 0
        self.is_closed = False
        self._event = asyncio.Event()

    def notify(self) -> None:
        self.version += 1
        self._event.set()
        self._event = asyncio.Event()

    def close(self) -> None:
        """Wake everybody to leave."""
        self.is_closed = True
        self.notify()

    async def after(self, version: int, timeout_s: float | None = None) -> None:
        """Return once the version is no longer `version`, or after `timeout_s`."""
        if self.version == version:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._event.wait(), timeout_s)


class RateMeter:
    """Rate and time left from a total that grows, over the last second or so."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, done_bytes: int) -> None:
        now = time.monotonic()
        self._seen.append((now, done_bytes))
        while len(self._seen) > 2 and self._seen[1][0] < now - _WINDOW_S:
            self._seen.popleft()

    @property
    def bytes_per_second(self) -> int:
        """0 while unknown."""
        (first, start), (last, end) = self._seen[0], self._seen[-1]
        return int((end - start) / (last - first)) if last > first else 0

    def eta_s(self, left_bytes: int) -> float | None:
        rate = self.bytes_per_second
        return left_bytes / rate if rate else None


async def follow(parts: Sequence[Part], view: Callable[[], ModelView], changes: Changes) -> AsyncIterator[Progress]:
    """News of `parts` until all are READY; slow callers hear less often, never less.

    Raises what their fill raised, or ShuttingDown.
    """
    meter, is_first = RateMeter(), True
    told: dict[str, set[int]] = {name: set() for name, _ in parts}
    total = sum(resident.arena.header.layout.data_bytes for _, resident in parts)
    while True:
        version = changes.version
        if changes.is_closed:
            raise ShuttingDown("the loader stops")
        if error := next((resident.error for _, resident in parts if resident.error), None):
            raise error
        done = sum(resident.ready_bytes for _, resident in parts)
        is_done = all(resident.is_ready for _, resident in parts)
        meter.add(done)
        yield Progress(
            view() if is_first or is_done else None,
            total,
            done,
            meter.bytes_per_second,
            meter.eta_s(total - done),
            _news(parts, told),
            is_done,
        )
        if is_done:
            return
        is_first = False
        await changes.after(version, _BEAT_S)


def _news(parts: Sequence[Part], told: dict[str, set[int]]) -> dict[str, list[int]]:
    """Extents that are READY and were not told before, by component."""
    news: dict[str, list[int]] = {}
    for name, resident in parts:
        ready = {extent for extent, state in enumerate(resident.states) if state is ExtentState.READY}
        if fresh := sorted(ready - told[name]):
            news[name] = fresh
            told[name] |= ready
    return news
