"""Filling: the right bytes, read once, in the order asked, for any number of callers."""

import asyncio
from pathlib import Path

import numpy as np
from headwater.loader.v1 import loader_pb2 as pb
from safetensors.numpy import load_file, save_file

from services.rpc.loader_client import LoaderClient
from tests.loader.support import Workbench, assert_holds, attach_component, prepared, tensor_bytes


def test_arena_bytes_are_what_the_library_reads(bench: Workbench) -> None:
    """Sharded or not, every tensor in the arena equals safetensors' own reading of the files."""
    bench.add_model("toy")

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            model = await prepared(client, "toy")
            assert model.state == pb.RESIDENCY_STATE_READY
            assert model.pipeline_class == "ToyPipeline"
            for name in ("text_encoder", "transformer"):
                files = (bench.folders["toy"] / name).glob("*.safetensors")
                loaded = {key: tensor for file in files for key, tensor in load_file(file).items()}
                with attach_component(bench, model, name) as arena:
                    assert_holds(arena, loaded)

    for flags in ((), ("--buffered-io", "--fill-threads", "1"), ("--max-fill-rate", "1MB")):
        with bench.loader(*flags):
            asyncio.run(use())


def test_twenty_callers_share_one_fill(bench: Workbench) -> None:
    """Each byte is read once, and every caller hears of every extent once."""
    tensors = bench.add_model("toy")

    async def follow(client: LoaderClient) -> list[tuple[str, int]]:
        return [
            (selection.component, extent)
            async for message in client.prepare("toy")
            for selection in message.ready
            for extent in selection.extents
        ]

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            heard = await asyncio.gather(*(follow(client) for _ in range(20)))
            model = await client.get_model("toy")

            assert model.read_bytes == tensor_bytes(tensors)
            every = {(part.name, extent) for part in model.components for extent in range(part.extent_count)}
            for one in heard:
                assert len(one) == len(every)
                assert set(one) == every

    with bench.loader("--max-fill-rate", "400KB"):
        asyncio.run(use())


def test_extents_come_in_the_order_asked(bench: Workbench) -> None:
    """Named extents first, one after the other as named, then the rest."""
    bench.add_model("toy")
    order = [
        ("transformer", [7, 3, 5]),
        ("text_encoder", [4]),
    ]

    async def use() -> None:
        heard: list[tuple[str, int]] = []
        async with LoaderClient(bench.address) as client:
            async for message in client.prepare("toy", order):
                heard += [(part.component, extent) for part in message.ready for extent in part.extents]
        assert heard[:4] == [("transformer", 7), ("transformer", 3), ("transformer", 5), ("text_encoder", 4)]

    with bench.loader("--max-fill-rate", "200KB", "--fill-threads", "1"):
        asyncio.run(use())


def test_a_later_callers_order_goes_before_what_nobody_named(bench: Workbench) -> None:
    """A sampler that knows what it needs does not wait behind a fill of everything."""
    bench.add_model("toy")
    last = ("transformer", [12])

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            first = client.prepare("toy")
            await anext(first)
            async for message in client.prepare("toy", [last]):
                if any(12 in part.extents for part in message.ready):
                    break
            assert message.ready_bytes < message.total_bytes // 2
            await first.aclose()

    with bench.loader("--max-fill-rate", "300KB", "--fill-threads", "1"):
        asyncio.run(use())


def test_an_extent_of_empty_tensors_becomes_ready(bench: Workbench) -> None:
    """Nothing has to be read for it, and a sampler that maps it must not wait for ever."""
    bench.add_model("toy")
    tensors = {"a": np.zeros((0, 3), np.float32), "b": np.ones((64, 128), np.float32)}
    save_file(tensors, bench.folders["toy"] / "text_encoder" / "model.safetensors")

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            model = await prepared(client, "toy")
            with attach_component(bench, model, "text_encoder") as arena:
                assert len(arena.extents) == 2
                assert_holds(arena, tensors)

    with bench.loader():
        asyncio.run(use())


def test_what_nobody_wants_any_more_is_not_read(bench: Workbench) -> None:
    """A fill rests within an extent of its last caller's leaving, and the next caller has only the rest read."""
    tensors = bench.add_model("toy", block_count=20)

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            stream = client.prepare("toy")
            first = await anext(stream)
            assert first.model.state == pb.RESIDENCY_STATE_FILLING
            assert first.model.config
            await stream.aclose()
            rested = await at_rest(client)
            assert ready_bytes(rested) < tensor_bytes(tensors) // 2
            assert rested.state == pb.RESIDENCY_STATE_FILLING

            assert (await prepared(client, "toy")).read_bytes == tensor_bytes(tensors)

    with bench.loader("--max-fill-rate", "400KB", "--fill-threads", "2"):
        asyncio.run(use())


def test_a_caller_that_leaves_does_not_stop_what_another_wants(bench: Workbench) -> None:
    """The fill goes on for who is still there."""
    tensors = bench.add_model("toy")

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            stays = asyncio.create_task(prepared(client, "toy"))
            leaves = client.prepare("toy", [("transformer", [3])])
            await anext(leaves)
            await leaves.aclose()
            assert (await stays).read_bytes == tensor_bytes(tensors)

    with bench.loader("--max-fill-rate", "400KB"):
        asyncio.run(use())


def test_what_work_stands_still_for_goes_first_and_hints_last(bench: Workbench) -> None:
    """Whoever asked first: HIGH before what others named, LOW after everything that anybody asks for."""
    bench.add_model("a", seed=1)
    bench.add_model("b", seed=2)

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            hint = client.prepare("a", priority=pb.PRIORITY_LOW)
            await anext(hint)
            heard: list[int] = []
            async for message in client.prepare("b", [("transformer", range(13))]):
                if message.model.name and not message.done:
                    stalled = client.prepare("b", [("transformer", [12])], pb.PRIORITY_HIGH)
                    await anext(stalled)
                heard += [
                    extent for part in message.ready if part.component == "transformer" for extent in part.extents
                ]
            hinted = await client.get_model("a")
            await stalled.aclose()
            await hint.aclose()
        assert heard.index(12) < 6
        assert ready_bytes(hinted) < hinted.components[0].size_bytes

    with bench.loader("--max-fill-rate", "300KB", "--fill-threads", "1"):
        asyncio.run(use())


def ready_bytes(model: pb.Model) -> int:
    return sum(part.ready_bytes for part in model.components)


async def at_rest(client: LoaderClient) -> pb.Model:
    """The model once nothing of it has become READY for a while."""
    model = await client.get_model("toy")
    while True:
        await asyncio.sleep(0.4)  # at the test's rate two threads fill several extents meanwhile
        before, model = model, await client.get_model("toy")
        if ready_bytes(before) == ready_bytes(model):
            return model


def test_eager_load_needs_no_caller(bench: Workbench) -> None:
    """All models become READY by themselves; one that does not fit the budget is left out, others stay."""
    bench.add_model("a", seed=1)
    bench.add_model("b", seed=2, block_count=60)

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            async for news in client.watch("test", ["a"]):
                if news.models[0].state == pb.RESIDENCY_STATE_READY:
                    break
            assert (await client.get_model("b")).state == pb.RESIDENCY_STATE_ABSENT

    with bench.loader("--eager-load", "--host-budget", "500KiB"):
        asyncio.run(use())


def test_models_with_the_same_files_share_an_arena(bench: Workbench) -> None:
    """One copy, one read; evicting one model spares what the other uses."""
    tensors = bench.add_model("one")
    bench.add_model("two", seed=9)
    source, target = (bench.folders[name] / "text_encoder" / "model.safetensors" for name in ("one", "two"))
    target.unlink()
    target.symlink_to(source)

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            one, two = await prepared(client, "one"), await prepared(client, "two")
            assert one.components[0].arena == two.components[0].arena
            assert one.components[1].arena != two.components[1].arena

            freed = await client.evict("one")

            assert freed >= one.components[1].size_bytes
            assert freed < one.components[0].size_bytes + one.components[1].size_bytes
            with attach_component(bench, await client.get_model("two"), "text_encoder") as arena:
                assert_holds(arena, tensors["text_encoder"])
            assert await client.evict("two") > 0
            assert await client.evict("two") == 0
            assert (await client.get_model("one")).state == pb.RESIDENCY_STATE_ABSENT
            assert not list(bench.arena_dir.glob("*.arena"))

    with bench.loader():
        asyncio.run(use())


def test_the_config_folder_has_the_small_files_and_no_weights(bench: Workbench) -> None:
    """A sampler needs no access to the model's disk."""
    bench.add_model("toy")
    source = bench.folders["toy"]
    (source / "text_encoder" / "pytorch_model.bin").write_bytes(b"x")
    (source / "notes").mkdir()
    (source / "notes" / "readme.txt").write_text("not a part of the pipeline")

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            model = await prepared(client, "toy")
            folder = bench.arena_dir / model.config
            assert found(folder) == {
                "model_index.json",
                "scheduler/scheduler_config.json",
                "text_encoder/config.json",
                "tokenizer/vocab.txt",
                "transformer/config.json",
            }
            for name in found(folder):
                assert (folder / name).read_bytes() == (source / name).read_bytes()
            await client.evict("toy")
            assert not folder.exists()

    def found(folder: Path) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    with bench.loader():
        asyncio.run(use())
