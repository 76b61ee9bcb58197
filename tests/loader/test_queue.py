"""The fill queue: urgency, order, and what is given out no more."""

import asyncio
from pathlib import Path

from services.loader.catalog import read_model
from services.loader.entries import ModelEntry
from services.loader.queue import FillQueue
from services.loader.records import Resident
from services.loader.tickets import Ticket, Urgency
from services.params.arena import ExtentState
from services.params.header import Header
from services.params.owned_arena import OwnedArena
from tests.loader.support import make_model


def resident_of(folder: Path) -> Resident:
    make_model(folder / "toy")
    source = read_model(ModelEntry("toy", folder / "toy"), 16384).components[1]
    header = Header(source.name, "ab" * 16, "cd" * 16, source.identity, source.layout)
    return Resident.of(OwnedArena.create(folder / "x.arena", header), source)


def test_each_extent_is_given_out_once_most_urgent_first(tmp_path: Path) -> None:
    """However often it was asked for; not what is READY, being worked on, failed or evicted."""
    resident = resident_of(tmp_path)
    other = resident_of(tmp_path / "other")

    async def use() -> None:
        queue, wish = FillQueue(99), Ticket()
        queue.put(resident, range(4), Urgency.EAGER, wish)
        queue.put(resident, [3, 2], Urgency.PREPARED, wish)
        queue.put(resident, [2, 1, 2], Urgency.NAMED, wish)
        resident.states[1] = ExtentState.READY
        assert [(await queue.take())[1] for _ in range(3)] == [2, 3, 0]
        assert resident.busy == {0, 2, 3}

        queue.put(resident, range(4, 8), Urgency.NAMED, wish)
        resident.is_gone = True
        queue.put(other, [5], Urgency.EAGER, wish)
        assert await queue.take() == (other, 5)

        waiting = asyncio.create_task(queue.take())
        await asyncio.sleep(0)
        assert not waiting.done()
        queue.put(other, [6], Urgency.EAGER, wish)
        assert await waiting == (other, 6)

    asyncio.run(use())
    resident.arena.close()
    other.arena.close()


def test_what_nobody_wants_any_more_is_passed_over(tmp_path: Path) -> None:
    """A wish whose caller left gives out nothing; what another wants of the same is given out."""
    resident = resident_of(tmp_path)

    async def use() -> None:
        queue, left, stays = FillQueue(99), Ticket(), Ticket()
        queue.put(resident, range(4), Urgency.NAMED, left)
        queue.put(resident, [2], Urgency.PREPARED, stays)
        left.release()
        assert await queue.take() == (resident, 2)

    asyncio.run(use())
    resident.arena.close()


def test_fills_are_bounded_and_checks_are_not(tmp_path: Path) -> None:
    """What a dead loader left is verified meanwhile; the next extent is given out when one is done."""
    resident, left = resident_of(tmp_path), resident_of(tmp_path / "left")

    async def use() -> None:
        queue, wish = FillQueue(2), Ticket()
        left.states[:3] = [ExtentState.VERIFYING] * 3
        queue.put(resident, range(4), Urgency.NAMED, wish)
        queue.put(left, range(4), Urgency.ADOPTED, wish)
        assert [(await queue.take()) for _ in range(5)] == [
            (resident, 0), (resident, 1), (left, 0), (left, 1), (left, 2),
        ]  # fmt: skip
        waiting = asyncio.create_task(queue.take())
        await asyncio.sleep(0)
        queue.done(left, 0)
        await asyncio.sleep(0.01)
        assert not waiting.done()
        queue.done(resident, 1)
        assert await waiting == (resident, 2)

    asyncio.run(use())
    resident.arena.close()
    left.arena.close()
