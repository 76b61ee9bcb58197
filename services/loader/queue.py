"""Which extent is filled next: by urgency, then in the order asked. What nobody wants any more is passed over."""

import asyncio
from collections import deque
from collections.abc import Iterable

from services.loader.records import Part, Resident
from services.loader.tickets import Order, Ticket, Urgency
from services.params.arena import ExtentState


class FillQueue:
    """Extents that somebody wants. An extent may stand in it many times; `take` gives each out once."""

    def __init__(self) -> None:
        self._lanes: tuple[deque[tuple[Resident, int, Ticket]], ...] = tuple(deque() for _ in Urgency)
        self._news = asyncio.Event()

    def put(self, resident: Resident, extents: Iterable[int], urgency: Urgency, ticket: Ticket) -> None:
        wanted = ((resident, extent, ticket) for extent in extents if _needs_work(resident, extent))
        self._lanes[urgency].extend(wanted)
        self._news.set()

    def put_all(self, parts: Iterable[Part], order: Order, ticket: Ticket) -> None:
        """All that a wish wants: what it names, in its order, then the rest."""
        by_name = dict(parts)
        for component, extents in order:
            resident = by_name[component]
            self.put(resident, extents or range(len(resident.states)), ticket.priority.named, ticket)
        for resident in by_name.values():
            self.put(resident, range(len(resident.states)), ticket.priority.rest, ticket)

    async def take(self) -> tuple[Resident, int]:
        """The next extent that needs work, marked busy; the caller takes it out of `busy`."""
        while True:
            for lane in self._lanes:
                while lane:
                    resident, extent, ticket = lane.popleft()
                    if ticket.is_open and _needs_work(resident, extent):
                        resident.busy.add(extent)
                        return resident, extent
            self._news.clear()
            await self._news.wait()


def _needs_work(resident: Resident, extent: int) -> bool:
    is_open = resident.states[extent] in (ExtentState.ABSENT, ExtentState.VERIFYING)
    return is_open and extent not in resident.busy and resident.error is None and not resident.is_gone
