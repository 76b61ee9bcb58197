"""Who rides now and who waits: a bounded first-come-first-served queue. Plain asyncio, one event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from services.errors import QueueFull


class Admission:
    """At most `rider_limit` pictures ride at once and `queue_limit` requests wait.

    A request that was admitted takes seats for its further pictures before requests that wait.
    """

    def __init__(self, rider_limit: int, queue_limit: int) -> None:
        self.rider_limit = rider_limit
        self.queue_limit = queue_limit
        self.riding_count = 0
        self._queue: list[Seat] = []  # further pictures first, then requests
        self._ride_s = 0.0  # running mean of how long a seat is kept

    @property
    def queued_count(self) -> int:
        """Requests that wait."""
        return sum(not seat.further for seat in self._queue)

    def seat(self, further: bool = False) -> Seat:
        """Queue for a seat. Raises QueueFull."""
        # Who can sit down at once does not queue.
        if not further and self.queued_count >= self.queue_limit and self.riding_count >= self.rider_limit:
            wait_s = self._estimate_s(self.queued_count)
            raise QueueFull(f"{self.queued_count} requests wait already: try again in {wait_s:.0f} s", wait_s)
        seat = Seat(self, further)
        at = sum(s.further for s in self._queue) if further else len(self._queue)
        self._queue.insert(at, seat)
        self._advance()
        return seat

    def _estimate_s(self, position: int) -> float:
        return max(1.0, self._ride_s * (position + 1) / self.rider_limit)

    def _advance(self) -> None:
        while self._queue and self.riding_count < self.rider_limit:
            self.riding_count += 1
            self._queue.pop(0)._sit()
        for seat in self._queue:
            seat._moved.set()

    def _freed(self, kept_s: float) -> None:
        self.riding_count -= 1
        self._ride_s = kept_s if not self._ride_s else 0.8 * self._ride_s + 0.2 * kept_s
        self._advance()


class Seat:
    """A place in the queue that becomes a seat. `leave` gives up either; it may be called again."""

    def __init__(self, admission: Admission, further: bool) -> None:
        self.further = further
        self._admission = admission
        self._moved = asyncio.Event()
        self._since: float | None = None

    async def wait(self) -> AsyncIterator[tuple[int, float | None]]:
        """Yield (requests ahead, estimated seconds or None) whenever that changes, and end when seated."""
        position = -1
        while self._since is None:
            self._moved.clear()  # before looking: what happens while the caller handles a position must wake us
            ahead = [s for s in self._admission._queue[: self._admission._queue.index(self)] if not s.further]
            if len(ahead) != position:
                position = len(ahead)
                estimate = self._admission._estimate_s(position) if self._admission._ride_s else None
                yield position, estimate
            await self._moved.wait()

    def leave(self) -> None:
        if self._since is not None:
            kept_s, self._since = time.monotonic() - self._since, None
            self._admission._freed(kept_s)
        elif self in self._admission._queue:
            self._admission._queue.remove(self)
            self._admission._advance()

    def _sit(self) -> None:
        self._since = time.monotonic()
        self._moved.set()
