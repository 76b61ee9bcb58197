"""Room that samplers hold and do not need: the loader asks for it, least recently used first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest
from headwater.loader.v1 import loader_pb2 as pb

from services import errors
from services.params.arena import AttachedArena
from services.rpc.loader_client import LoaderClient
from tests.loader.support import Workbench, attach_component
from tests.loader.test_loader_faults import refused

BUDGET = "480KiB"  # two of the toy models


@dataclass
class Holder:
    """Maps models as a sampler does, and lets go when it is asked, if it is willing."""

    bench: Workbench
    client: LoaderClient
    is_willing: bool = True
    asked: list[str] = field(default_factory=list)
    held: dict[str, list[AttachedArena]] = field(default_factory=dict)

    async def hold(self, name: str) -> None:
        model = [news.model async for news in self.client.prepare(name, replica="holder")][-1]
        self.held[name] = [attach_component(self.bench, model, part.name) for part in model.components]

    async def watch(self) -> None:
        async for news in self.client.watch("holder"):
            self.asked += news.give_back
            for name in news.give_back if self.is_willing else ():
                self.let_go(name)

    def let_go(self, name: str) -> None:
        for arena in self.held.pop(name, []):
            arena.close()


@asynccontextmanager
async def holding(bench: Workbench, *names: str) -> AsyncIterator[Holder]:
    """A holder of these models, in this order, that watches."""
    async with LoaderClient(bench.address) as client:
        holder = Holder(bench, client)
        watch = asyncio.create_task(holder.watch())
        for name in names:
            await holder.hold(name)
        try:
            yield holder
        finally:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch
            for name in list(holder.held):
                holder.let_go(name)


@pytest.fixture
def three(bench: Workbench) -> Workbench:
    for seed, name in enumerate("abc"):
        bench.add_model(name, seed=seed * 10)
    return bench


async def states(client: LoaderClient) -> str:
    return "".join("-AFRX"[model.state] for model in await client.list_models())


def test_what_was_used_least_recently_is_asked_back(three: Workbench) -> None:
    """One model is enough, so one is asked for; the other one's holder hears nothing."""

    async def use() -> None:
        async with holding(three, "b", "a") as holder:
            await holder.hold("c")
            assert holder.asked == ["b"]
            assert await states(holder.client) == "RAR"

    with three.loader("--host-budget", BUDGET):
        asyncio.run(use())


def test_who_does_not_let_go_is_named(three: Workbench) -> None:
    """After some seconds RESOURCE_EXHAUSTED says who holds what; nothing was evicted, and later there is room."""

    async def use() -> None:
        async with holding(three, "a", "b") as holder:
            holder.is_willing = False
            text = await refused(holder.hold("c"), errors.HostMemoryFull, "a/transformer in use by holder")
            assert "b/text_encoder in use by holder" in text
            assert set(holder.asked) <= {"a", "b"}
            assert await states(holder.client) == "RRA"
            holder.let_go("a")
            await holder.hold("c")
            assert await states(holder.client) == "ARR"

    with three.loader("--host-budget", BUDGET):
        asyncio.run(use())


def test_pinned_models_hints_and_eager_loads_ask_nobody(three: Workbench) -> None:
    """What is pinned stays; a hint takes only what nobody maps."""
    three.options["a"] = three.options["b"] = "pin = true"

    async def use() -> None:
        async with holding(three, "a", "b") as holder:
            await refused(holder.hold("c"), errors.HostMemoryFull, "a/transformer in use by holder")
            assert holder.asked == []

    with three.loader("--host-budget", BUDGET):
        asyncio.run(use())
    three.options.clear()

    async def hint() -> None:
        async with holding(three, "a", "b") as holder:
            call = holder.client.prepare("c", priority=pb.PRIORITY_LOW)
            await refused(anext(call), errors.HostMemoryFull, "needed")
            assert holder.asked == []
            holder.let_go("b")
            assert [news async for news in holder.client.prepare("c", priority=pb.PRIORITY_LOW)][-1].done
            assert await states(holder.client) == "RAR"

    with three.loader("--host-budget", BUDGET):
        asyncio.run(hint())


def test_nobody_is_asked_in_vain(three: Workbench) -> None:
    """For what the budget can never hold, or not beside what is being filled, no holder has to let go."""
    three.add_model("huge", seed=99, block_count=60)

    async def use() -> None:
        async with holding(three, "a") as holder:
            await refused(holder.hold("huge"), errors.HostMemoryFull, "raise it")
            filling = holder.client.prepare("b")
            await anext(filling)
            await refused(holder.hold("huge"), errors.HostMemoryFull, "raise it")
            assert holder.asked == []
            await filling.aclose()

    with three.loader("--host-budget", BUDGET):
        asyncio.run(use())
