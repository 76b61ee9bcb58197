"""Which extent is worked on next: by urgency, then in the order asked. What nobody wants any more is passed over."""

import asyncio
from collections import deque
from collections.abc import Iterable

from services.loader.records import Part, Resident
from services.loader.tickets import Order, Ticket, Urgency
from services.params.arena import ExtentState

_Lane = deque[tuple[Resident, int, Ticket]]


class FillQueue:
    """Extents that somebody wants. An extent may stand in it many times; `take` gives each out once, until `done`.

    At most `fill_limit` extents are filled at a time: what is done one after the other is there sooner than what is
    begun all at once. Of those that only have to be verified there may be any number.
    """

    def __init__(self, fill_limit: int) -> None:
        self._fill_limit = fill_limit
        self._fills: tuple[_Lane, ...] = tuple(deque() for _ in Urgency)
        self._checks: tuple[_Lane, ...] = tuple(deque() for _ in Urgency)
        self._filling: set[tuple[Resident, int]] = set()
        self._news = asyncio.Event()

    def put(self, resident: Resident, extents: Iterable[int], urgency: Urgency, ticket: Ticket) -> None:
        for extent in extents:
            if _needs_work(resident, extent):
                lanes = self._checks if resident.states[extent] is ExtentState.VERIFYING else self._fills
                lanes[urgency].append((resident, extent, ticket))
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
        """The next extent that needs work, marked busy."""
        while True:
            for checks, fills in zip(self._checks, self._fills, strict=True):
                if found := _first_wanted(checks):
                    return found
                if len(self._filling) < self._fill_limit and (found := _first_wanted(fills)):
                    self._filling.add(found)
                    return found
            self._news.clear()
            await self._news.wait()

    def done(self, resident: Resident, extent: int) -> None:
        """Nobody works on it any more."""
        resident.busy.discard(extent)
        self._filling.discard((resident, extent))
        self._news.set()


def _first_wanted(lane: _Lane) -> tuple[Resident, int] | None:
    while lane:
        resident, extent, ticket = lane.popleft()
        if ticket.is_open and _needs_work(resident, extent):
            resident.busy.add(extent)
            return resident, extent
    return None


def _needs_work(resident: Resident, extent: int) -> bool:
    is_open = resident.states[extent] in (ExtentState.ABSENT, ExtentState.VERIFYING)
    return is_open and extent not in resident.busy and resident.error is None and not resident.is_gone
