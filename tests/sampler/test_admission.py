"""Who rides and who waits."""

from __future__ import annotations

import asyncio

import pytest

from services.errors import QueueFull
from services.sampler.admission import Admission, Seat


async def seated(seat: Seat, heard: list[int]) -> None:
    async for position, _ in seat.wait():
        heard.append(position)


def test_first_come_first_served() -> None:
    """Positions count down as seats are freed, and the order is that of arrival."""

    async def story() -> None:
        admission = Admission(rider_limit=1, queue_limit=8)
        first, second, third = (admission.seat() for _ in range(3))
        await seated(first, [])
        heard: list[list[int]] = [[], []]
        waiting = [asyncio.create_task(seated(s, h)) for s, h in zip((second, third), heard, strict=True)]
        await asyncio.sleep(0)
        first.leave()
        await waiting[0]
        assert not waiting[1].done()
        second.leave()
        await waiting[1]
        assert heard == [[0], [1, 0]]
        assert (admission.riding_count, admission.queued_count) == (1, 0)

    asyncio.run(story())


def test_further_pictures_go_before_waiting_requests() -> None:
    """A request that rides finishes its pictures before the next request starts; positions count requests only."""

    async def story() -> None:
        admission = Admission(rider_limit=1, queue_limit=8)
        first = admission.seat()
        request = admission.seat()
        further = admission.seat(further=True)
        heard: list[int] = []
        task = asyncio.create_task(seated(request, heard))
        await asyncio.sleep(0)
        first.leave()
        await seated(further, [])
        assert not task.done()
        further.leave()
        await task
        assert heard == [0]

    asyncio.run(story())


def test_full_queue_says_when_to_come_back() -> None:
    """One more than the limit is refused with a delay; who leaves the queue makes room."""

    async def story() -> None:
        admission = Admission(rider_limit=1, queue_limit=1)
        admission.seat()
        waits = admission.seat()
        with pytest.raises(QueueFull) as full:
            admission.seat()
        assert full.value.retry_after_s >= 1
        waits.leave()
        waits.leave()  # may be called again
        admission.seat()

    asyncio.run(story())


def test_leaving_twice_frees_one_seat() -> None:
    """A seat is given back once, whatever its owner does."""

    async def story() -> None:
        admission = Admission(rider_limit=2, queue_limit=1)
        seat = admission.seat()
        seat.leave()
        seat.leave()
        assert admission.riding_count == 0

    asyncio.run(story())


def test_a_seat_freed_while_the_position_is_told() -> None:
    """A request whose turn comes while its caller still handles the last position is seated, not forgotten."""

    async def story() -> None:
        admission = Admission(rider_limit=1, queue_limit=8)
        first, second = admission.seat(), admission.seat()
        async with asyncio.timeout(5):
            async for position, _ in second.wait():
                assert position == 0
                first.leave()

    asyncio.run(story())
