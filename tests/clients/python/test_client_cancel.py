"""Every way to stop waiting stops the work on the server."""

import asyncio
import threading
from contextlib import aclosing
from typing import Any, ClassVar

import pytest
from client_theatre import ScriptedSampler, Stage, Theatre
from headwater_client import AsyncClient, Cancelled, Client, DeadlineExceeded, Started
from headwater_client.transport import Asyncio


async def begin_and_hang(stage: Stage) -> None:
    await stage.started()
    await stage.hang()


@pytest.fixture(autouse=True)
def hanging(sampler: ScriptedSampler) -> None:
    """The sampler starts and never ends."""
    sampler.scripts = [begin_and_hang]


def test_breaking_out_cancels(client: Client, sampler: ScriptedSampler) -> None:
    """Leaving the loop is enough."""
    for event in client.stream("a fox"):
        assert isinstance(event, Started)
        break

    assert sampler.cancelled.wait(5)


def test_closing_a_held_iterator_cancels(client: Client, sampler: ScriptedSampler) -> None:
    """close() cancels at once although the iterator is still referred to."""
    events = client.stream("a fox")
    next(events)
    events.close()

    assert sampler.cancelled.wait(5)
    assert next(events, None) is None


def test_an_error_in_on_event_cancels(client: Client, sampler: ScriptedSampler) -> None:
    """What the callback raises comes out, and the server stops."""

    def refuse(event: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        client.generate("a fox", on_event=refuse)

    assert sampler.cancelled.wait(5)


def test_the_timeout_cancels(client: Client, sampler: ScriptedSampler) -> None:
    """timeout is a deadline of the whole call."""
    with pytest.raises(DeadlineExceeded, match="timeout passed") as caught:
        client.generate("a fox", timeout=0.3)

    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert sampler.cancelled.wait(5)


@pytest.mark.parametrize("method", ["generate", "status"])
def test_closing_the_client_ends_calls_of_other_threads(client: Client, sampler: ScriptedSampler, method: str) -> None:
    """A call in flight ends as Cancelled, and the client is of no more use."""
    sampler.mute = True
    closer = threading.Thread(target=lambda: sampler.hanging.wait(5) and client.close())
    closer.start()
    with pytest.raises(Cancelled):
        client.generate("a fox") if method == "generate" else client.status()
    closer.join()

    with pytest.raises(RuntimeError, match="closed"):
        client.status()


def test_a_call_is_cancelled_even_if_it_is_referred_to(
    theatre: Theatre, sampler: ScriptedSampler, address: str
) -> None:
    """The end of an iterator does not leave the cancelling to the garbage collector."""

    class Keeping(Asyncio):
        calls: ClassVar[list[Any]] = []

        async def read(self, call: Any) -> Any:
            self.calls.append(call)
            return await super().read(call)

    async def leave() -> None:
        async with AsyncClient(address, transport=Keeping()) as client:
            async with aclosing(client.stream("a fox")) as events:
                await anext(events)
            assert await asyncio.to_thread(sampler.cancelled.wait, 5)

    theatre.run(leave())


def test_breaking_out_of_async_for_cancels(theatre: Theatre, sampler: ScriptedSampler, address: str) -> None:
    """Leaving `async for` is enough, and so is aclosing()."""

    async def leave(close: bool) -> None:
        async with AsyncClient(address) as client:
            if close:
                async with aclosing(client.stream("a fox")) as events:
                    await anext(events)
            else:
                async for _ in client.stream("a fox"):
                    break
            assert await asyncio.to_thread(sampler.cancelled.wait, 5)

    for close in (False, True):
        sampler.cancelled.clear()
        theatre.run(leave(close))


def test_cancelling_the_task_cancels(theatre: Theatre, sampler: ScriptedSampler, address: str) -> None:
    """A cancelled task ends as cancelled, not as an error of ours; asyncio.timeout works."""

    async def abandon() -> None:
        async with AsyncClient(address) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await client.generate("a fox")
            assert await asyncio.to_thread(sampler.cancelled.wait, 5)

    theatre.run(abandon())


@pytest.mark.parametrize("method", ["generate", "status"])
def test_closing_the_asyncio_client_ends_its_calls(
    theatre: Theatre, sampler: ScriptedSampler, address: str, method: str
) -> None:
    """The waiting task gets our Cancelled, not asyncio's, for nobody cancelled the task."""
    sampler.mute = True

    async def close_under_it() -> None:
        client = AsyncClient(address)
        task = asyncio.create_task(client.generate("a fox") if method == "generate" else client.status())
        assert await asyncio.to_thread(sampler.hanging.wait, 5)
        await client.aclose()
        with pytest.raises(Cancelled):
            await asyncio.wait_for(task, 5)

    theatre.run(close_under_it())
