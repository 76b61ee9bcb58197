"""Which extent is filled next: what callers named, then the rest of what they prepare, adopted ones, eager ones."""

import asyncio
from collections import deque
from collections.abc import Iterable
from enum import IntEnum

from services.loader.records import Resident
from services.params.arena import ExtentState


class Urgency(IntEnum):
    """Smaller goes first; equals go in the order asked."""

    NAMED = 0
    PREPARED = 1
    ADOPTED = 2
    EAGER = 3


class FillQueue:
    """Extents that somebody wants. An extent may stand in it many times; `take` gives each out once."""

    def __init__(self) -> None:
        self._lanes: tuple[deque[tuple[Resident, int]], ...] = tuple(deque() for _ in Urgency)
        self._news = asyncio.Event()

    def put(self, resident: Resident, extents: Iterable[int], urgency: Urgency) -> None:
        self._lanes[urgency].extend((resident, extent) for extent in extents if _needs_work(resident, extent))
        self._news.set()

    async def take(self) -> tuple[Resident, int]:
        """The next extent that needs work, marked busy; the caller takes it out of `busy`."""
        while True:
            for lane in self._lanes:
                while lane:
                    resident, extent = lane.popleft()
                    if _needs_work(resident, extent):
                        resident.busy.add(extent)
                        return resident, extent
            self._news.clear()
            await self._news.wait()


def _needs_work(resident: Resident, extent: int) -> bool:
    is_open = resident.states[extent] in (ExtentState.ABSENT, ExtentState.VERIFYING)
    return is_open and extent not in resident.busy and resident.error is None and not resident.is_gone
