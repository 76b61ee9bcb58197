"""The store in this process: what only a chosen moment shows."""

import asyncio
import random
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services import errors
from services.loader.arenas import ArenaDir
from services.loader.entries import ModelEntry
from services.loader.extent_fill import ExtentFill
from services.loader.fill import Filler
from services.loader.reads import Read
from services.loader.records import Progress, Residency
from services.loader.store import ParamStore
from services.params.arena import attach
from services.params.owned_arena import OwnedArena
from services.rpc.loader_client import LoaderClient
from tests.loader.support import Tensors, Workbench, assert_holds, attach_component, prepared, workbench


@asynccontextmanager
async def running(bench: Workbench, rate: int | None = None, budget: int | None = None) -> AsyncIterator[ParamStore]:
    """A store over the workbench's models, stopped at the end with nothing left behind."""
    entries = [ModelEntry(name, folder) for name, folder in bench.folders.items()]
    directory = ArenaDir.open(bench.arena_dir)
    store = ParamStore(entries, directory, Filler(3, rate), 16384, budget)
    try:
        await store.scan()
        await store.adopt()
        store.begin()
        yield store
    finally:
        await store.stop()
        directory.close()
    assert not list(bench.memory.iterdir())


async def drain(stream: AsyncIterator[Progress]) -> Progress:
    return [progress async for progress in stream][-1]


def arenas(bench: Workbench) -> list[str]:
    return sorted(path.name for path in bench.arena_dir.glob("*.arena"))


def held_back(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """(lets reservations go on, set once one has begun)."""
    gate, entered = threading.Event(), threading.Event()
    real = OwnedArena.reserve

    def slow(self: OwnedArena) -> None:
        entered.set()
        assert gate.wait(10)
        real(self)

    monkeypatch.setattr(OwnedArena, "reserve", slow)
    return gate, entered


def test_a_caller_that_leaves_during_the_reservation(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reservation is finished and filled, nothing is lost or held for the caller that left."""
    bench.add_model("toy")
    gate, entered = held_back(monkeypatch)

    async def use() -> None:
        async with running(bench) as store:
            caller = asyncio.create_task(drain(store.prepare("toy")))
            await asyncio.to_thread(entered.wait)
            caller.cancel()
            with pytest.raises(asyncio.CancelledError):
                await caller
            assert len(arenas(bench)) == 2
            gate.set()
            async with asyncio.timeout(20):
                while not await evicted(store, "toy"):  # noqa: ASYNC110 - begun extents are finished first
                    await asyncio.sleep(0.01)
            assert arenas(bench) == []

    asyncio.run(use())


async def evicted(store: ParamStore, name: str) -> bool:
    with suppress(errors.Leased):
        return await store.evict(name) > 0
    return False


def full_for_the_transformer(owner: type, name: str) -> Any:
    """`owner.name`, but with no room for one component of the toy model."""
    real = getattr(owner, name)

    def method(self: Any, *arguments: Any) -> Any:
        header = arguments[0] if arguments else self.header
        if header.component == "transformer":
            raise errors.HostMemoryFull("no room")
        return real(self, *arguments)

    return method


@pytest.mark.parametrize(("owner", "name"), [(ArenaDir, "create"), (OwnedArena, "reserve")])
def test_a_reservation_that_fails_halfway_leaves_nothing(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    """One component has room, the other has not: neither stays, and the next prepare works."""
    bench.add_model("toy")

    async def use() -> None:
        async with running(bench) as store:
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, full_for_the_transformer(owner, name))
                with pytest.raises(errors.HostMemoryFull, match="MiB needed"):
                    await drain(store.prepare("toy"))
            assert [path.name for path in bench.arena_dir.iterdir()] == ["loader.lock"]
            assert store.model("toy").state is Residency.ABSENT
            assert (await drain(store.prepare("toy"))).is_done

    asyncio.run(use())


def test_extents_are_filled_while_memory_is_reserved(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is not idle meanwhile; callers hear of it afterwards, when samplers can attach."""
    bench.add_model("toy")
    gate, _ = held_back(monkeypatch)

    async def use() -> None:
        async with running(bench) as store:
            caller = asyncio.create_task(drain(store.prepare("toy")))
            async for news in store.watch("test"):
                if news.models[0].state is Residency.READY:
                    break
            assert not caller.done()
            gate.set()
            assert (await caller).is_done

    asyncio.run(use())


def test_a_failed_config_copy_leaves_nothing(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arenas that were reserved with it go as well."""
    bench.add_model("toy")

    def publish(self: ArenaDir, name: str, source: object) -> str:
        raise errors.HostMemoryFull("no room")

    async def use() -> None:
        async with running(bench) as store:
            with monkeypatch.context() as patch:
                patch.setattr(ArenaDir, "publish_config", publish)
                with pytest.raises(errors.HostMemoryFull):
                    await drain(store.prepare("toy"))
            assert arenas(bench) == []

    asyncio.run(use())


def test_a_change_during_the_last_extent_is_noticed(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is checked after the bytes are in memory and before they are published."""
    bench.add_model("toy")
    victim = bench.folders["toy"] / "text_encoder" / "model.safetensors"
    bring = ExtentFill._bring

    def bring_and_touch(self: ExtentFill, read: Read) -> None:
        bring(self, read)
        header = self._arena.header
        if header.component == "text_encoder" and self._extent == len(header.layout.extents) - 1:
            victim.touch()

    async def use() -> None:
        async with running(bench) as store:
            monkeypatch.setattr(ExtentFill, "_bring", bring_and_touch)
            order = [("transformer", range(13)), ("text_encoder", range(7))]
            with pytest.raises(errors.CheckpointChanged):
                await drain(store.prepare("toy", order))
            assert store.model("toy").state is Residency.FAILED
            assert store.model("toy").components[0].ready_bytes < store.model("toy").components[0].size_bytes
            monkeypatch.undo()
            before = arenas(bench)
            for shard in (bench.folders["toy"] / "transformer").glob("*.safetensors"):
                shard.touch()  # what is in memory of it is of files that are no more
            assert (await drain(store.prepare("toy"))).is_done
            assert len(arenas(bench)) == 2
            assert not set(arenas(bench)) & set(before)

    asyncio.run(use())


STEPS = st.lists(
    st.tuples(st.sampled_from(["prepare", "leave", "evict", "wait"]), st.sampled_from(["a", "b", "c"])),
    max_size=14,
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_any_interleaving_leaves_a_legal_store(tmp_path_factory: pytest.TempPathFactory, steps: Any) -> None:
    """Whatever callers do, files and residents agree, errors are typed, and every model can be had afterwards."""
    with workbench(tmp_path_factory.mktemp("disk")) as bench:
        tensors = {name: bench.add_model(name, seed) for seed, name in enumerate("abc")}
        asyncio.run(_interleave(bench, tensors, steps))


async def _interleave(bench: Workbench, tensors: dict[str, dict[str, Tensors]], steps: list[tuple[str, str]]) -> None:
    async with running(bench, rate=4_000_000, budget=520 << 10) as store:
        callers: list[asyncio.Task[Progress]] = []
        for action, name in steps:
            if action == "prepare":
                callers.append(asyncio.create_task(drain(store.prepare(name, [("transformer", [3])]))))
            elif action == "leave" and callers:
                callers.pop().cancel()
            elif action == "evict":
                with suppress(errors.Leased):
                    await store.evict(name)
            elif action == "wait":
                await asyncio.sleep(0.01)
        for result in await asyncio.gather(*callers, return_exceptions=True):
            assert isinstance(result, Progress | errors.HostMemoryFull | asyncio.CancelledError)
        shown = sorted(part.arena for view in store.models() for part in view.components if part.arena)
        assert shown == arenas(bench)
        for name, components in tensors.items():
            last = await drain(store.prepare(name))
            assert last.model
            for part in last.model.components:
                with attach(bench.arena_dir / part.arena, part.generation) as arena:
                    assert_holds(arena, components[part.name])


def test_killed_again_and_again(bench: Workbench) -> None:
    """Wherever kill -9 lands, the next loader serves the right bytes, and what was READY is not read again."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    tensors = bench.add_model("toy", block_count=20)

    async def until(ready: int) -> None:
        async with LoaderClient(bench.address) as client:
            async for message in client.prepare("toy"):
                if message.ready_bytes >= ready:
                    return

    for _ in range(4):
        with bench.loader("--max-fill-rate", "2MB") as process:
            asyncio.run(until(chance.randrange(1, 500_000)))
            process.send_signal(signal.SIGKILL)
            process.wait()

    async def finish() -> None:
        async with LoaderClient(bench.address) as client:
            model = await prepared(client, "toy")
            for name, expected in tensors.items():
                with attach_component(bench, model, name) as arena:
                    assert_holds(arena, expected)

    with bench.loader():
        asyncio.run(finish())


def test_a_folder_on_disk_needs_the_flag(tmp_path: Path) -> None:
    """Only with --allow-disk."""
    ArenaDir.open(tmp_path / "arenas", allow_disk=True).close()
    assert not (tmp_path / "arenas").exists()
