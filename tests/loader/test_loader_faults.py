"""What goes wrong: memory, leases, checkpoints, requests. Every status is typed and names no path."""

import asyncio
import os
import struct
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
from headwater.loader.v1 import loader_pb2 as pb
from safetensors.numpy import load_file

from services import errors
from services.rpc.loader_client import LoaderClient
from tests.loader.support import Workbench, assert_holds, attach_component, needs_mount, prepared, tensor_bytes


async def refused(work: Awaitable[Any], kind: type[errors.HeadwaterError], words: str) -> str:
    """The sentence of the refusal: of the right type, with the words, without a path."""
    with pytest.raises(kind, match=words) as caught:
        await work
    text = str(caught.value)
    for path in ("/tmp", "/dev/shm", "/root", "/home", "0x"):
        assert path not in text
    return text


@needs_mount
def test_a_full_tmpfs_is_a_status_and_leaves_nothing(bench: Workbench) -> None:
    """RESOURCE_EXHAUSTED with the numbers; what does fit is served afterwards."""
    bench.add_model("large", block_count=40)
    small = bench.add_model("small", seed=2)

    async def use(inside: Path) -> None:
        async with LoaderClient(bench.address) as client:
            await refused(prepared(client, "large"), errors.HostMemoryFull, r"MiB needed, .* MiB free; held: nothing")
            assert sorted(path.name for path in inside.iterdir()) == [".loader.sock", "loader.lock"]
            assert os.statvfs(inside).f_bfree >= os.statvfs(inside).f_blocks - 4
            large = await client.get_model("large")
            assert large.state == pb.RESIDENCY_STATE_ABSENT
            assert not large.config
            model = await prepared(client, "small")
            assert model.read_bytes == tensor_bytes(small)

    with bench.loader_on_tmpfs("400k") as inside:
        asyncio.run(use(inside))


@needs_mount
def test_a_tmpfs_without_room_for_the_small_files_is_full(bench: Workbench) -> None:
    """Not a fault of the model: RESOURCE_EXHAUSTED, and nothing stays."""
    bench.add_model("toy")
    (bench.folders["toy"] / "tokenizer" / "vocab.txt").write_bytes(b"a" * (300 << 10))

    async def use(inside: Path) -> None:
        async with LoaderClient(bench.address) as client:
            await refused(prepared(client, "toy"), errors.HostMemoryFull, "No space left|MiB needed")
            assert sorted(path.name for path in inside.iterdir()) == [".loader.sock", "loader.lock"]

    with bench.loader_on_tmpfs("400k") as inside:
        asyncio.run(use(inside))


def test_the_budget_evicts_the_least_recently_used(bench: Workbench) -> None:
    """Room is made from what nobody uses, oldest first; nothing is evicted in vain or from a sampler."""
    for seed, name in enumerate(("a", "b", "c")):
        bench.add_model(name, seed=seed * 10)
    bench.add_model("huge", seed=99, block_count=60)

    async def states(client: LoaderClient) -> str:
        return "".join("-AFRX"[model.state] for model in await client.list_models())

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            await prepared(client, "a")
            model = await prepared(client, "b")
            assert await states(client) == "RRAA"
            await refused(prepared(client, "huge"), errors.HostMemoryFull, r"needs 1\.8 MiB and --host-budget is 0\.5")
            assert await states(client) == "RRAA"
            await prepared(client, "a")  # b is the older one now
            await prepared(client, "c")
            assert await states(client) == "RARA"

            a = await prepared(client, "a")
            with attach_component(bench, a, "text_encoder"), attach_component(bench, a, "transformer"):
                await prepared(client, "b")
                assert await states(client) == "RRAA"
                b = await client.get_model("b")
                with attach_component(bench, b, "text_encoder"), attach_component(bench, b, "transformer"):
                    text = await refused(prepared(client, "c"), errors.HostMemoryFull, "in use")
                    assert "a/transformer" in text
            assert model.name == "b"

    with bench.loader("--host-budget", "480KiB"):
        asyncio.run(use())


def test_a_pinned_model_is_not_evicted_for_others(bench: Workbench) -> None:
    """The older one stays, for it is pinned; an operator may evict it all the same."""
    for seed, name in enumerate(("a", "b", "c")):
        bench.add_model(name, seed=seed * 10)
    bench.options["a"] = bench.options["b"] = "pin = true"

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            await prepared(client, "a")
            await prepared(client, "c")
            await prepared(client, "b")
            assert [model.state for model in await client.list_models()] == [
                pb.RESIDENCY_STATE_READY,
                pb.RESIDENCY_STATE_READY,
                pb.RESIDENCY_STATE_ABSENT,
            ]
            await refused(prepared(client, "c"), errors.HostMemoryFull, "held: a/.* pinned")
            assert await client.evict("a") > 0
            await prepared(client, "c")

    with bench.loader("--host-budget", "480KiB"):
        asyncio.run(use())


def test_a_leased_model_is_not_evicted(bench: Workbench) -> None:
    """FAILED_PRECONDITION while one component is mapped, and nothing of the model goes."""
    tensors = bench.add_model("toy")

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            watch = client.watch("replica-7")
            await anext(watch)
            model = [news.model async for news in client.prepare("toy", replica="replica-7")][-1]
            with attach_component(bench, model, "text_encoder") as arena:
                await refused(client.evict("toy"), errors.Leased, "replica-7")
                assert_holds(arena, tensors["text_encoder"])
                assert (await client.get_model("toy")).state == pb.RESIDENCY_STATE_READY
            await watch.aclose()
            assert await client.evict("toy") >= sum(part.size_bytes for part in model.components)

    with bench.loader():
        asyncio.run(use())


def test_a_model_being_filled_for_somebody_is_not_evicted(bench: Workbench) -> None:
    """An open prepare call holds what it waits for."""
    bench.add_model("toy")

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            stream = client.prepare("toy")
            await anext(stream)
            await refused(client.evict("toy"), errors.Leased, "being filled")
            await stream.aclose()

    with bench.loader("--max-fill-rate", "50KB"):
        asyncio.run(use())


def test_unknown_models_and_bad_orders_are_refused(bench: Workbench) -> None:
    """Typed, all bad fields at once, and the next good call works."""
    bench.add_model("toy")
    order = [
        ("unet", [0]),
        ("transformer", [0, 13]),
        ("transformer", [-1]),
    ]

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            for call in (
                client.get_model("no"),
                client.evict("no"),
                prepared(client, "no"),
                anext(client.watch("", ["no"])),
            ):
                await refused(call, errors.UnknownModel, "no model 'no'; known: toy")
            await refused(client.get_model(""), errors.InvalidRequest, "model: ")
            await refused(anext(client.watch("x" * 129)), errors.InvalidRequest, "replica: ")
            with pytest.raises(errors.InvalidRequest) as caught:
                await prepared(client, "toy", order)
            assert [field for field, _ in caught.value.violations] == [
                "order[0].component",
                "order[1].extents",
                "order[2].extents",
            ]
            assert (await client.get_model("toy")).state == pb.RESIDENCY_STATE_ABSENT
            await prepared(client, "toy")

    with bench.loader():
        asyncio.run(use())


def test_a_broken_model_is_named_and_the_others_are_served(bench: Workbench) -> None:
    """A truncated shard is FAILED with the reason; when it is mended, the next prepare serves it."""
    tensors = bench.add_model("broken")
    bench.add_model("good", seed=5)
    shard = next((bench.folders["broken"] / "transformer").glob("*-00001-*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            broken, good = await client.list_models()
            assert broken.state == pb.RESIDENCY_STATE_FAILED
            assert "truncated" in broken.reason
            assert broken.reason.startswith(f"transformer/{shard.name}: ")
            assert good.state == pb.RESIDENCY_STATE_ABSENT
            await refused(prepared(client, "broken"), errors.BadCheckpoint, "transformer/.*truncated")
            await prepared(client, "good")
            shard.write_bytes(whole)
            model = await prepared(client, "broken")
            with attach_component(bench, model, "transformer") as arena:
                assert_holds(arena, tensors["transformer"])

    with bench.loader():
        asyncio.run(use())


@pytest.mark.parametrize("how", ["rewritten", "truncated", "removed"])
def test_a_file_that_changes_while_it_is_read_is_noticed(bench: Workbench, how: str) -> None:
    """DATA_LOSS, the model FAILED; asked again, it is served as the files are then, or refused."""
    bench.add_model("toy")
    path = bench.folders["toy"] / "text_encoder" / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    other = raw[: 8 + length] + bytes(255 - byte for byte in raw[8 + length :])

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            stream = client.prepare("toy")
            async for message in stream:
                if message.ready:
                    break
            if how == "removed":
                path.unlink()
            else:
                path.write_bytes(other if how == "rewritten" else raw[:-100])
            await refused(drain(stream), errors.CheckpointChanged, r"model\.safetensors")
            assert (await client.get_model("toy")).state == pb.RESIDENCY_STATE_FAILED
            if how == "rewritten":
                model = await prepared(client, "toy")
                with attach_component(bench, model, "text_encoder") as arena:
                    assert_holds(arena, load_file(path))
            else:
                await refused(prepared(client, "toy"), errors.BadCheckpoint, r"text_encoder")

    async def drain(stream: Any) -> None:
        async for _ in stream:
            pass

    with bench.loader("--max-fill-rate", "60KB", "--fill-threads", "1"):
        asyncio.run(use())


def test_watch_tells_all_then_changes(bench: Workbench) -> None:
    """First every watched model, then those that changed, the newest state only."""
    bench.add_model("a")
    bench.add_model("b", seed=2)

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            watch = client.watch("replica-1")
            first = await anext(watch)
            assert [model.name for model in first.models] == ["a", "b"]
            await prepared(client, "b")
            async for news in watch:
                assert [model.name for model in news.models] == ["b"]
                if news.models[0].state == pb.RESIDENCY_STATE_READY:
                    break
            await client.evict("b")
            async for news in watch:
                if news.models[0].state == pb.RESIDENCY_STATE_ABSENT:
                    break

    with bench.loader():
        asyncio.run(use())
