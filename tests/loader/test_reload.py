"""Hot change: models come, go and are replaced while the loader serves; what somebody maps stays theirs."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path

from headwater.loader.v1 import loader_pb2 as pb
from safetensors.numpy import save_file

from services import errors
from services.params.arena import AttachedArena, attach
from services.rpc.loader_client import LoaderClient
from tests.loader.support import (
    Tensors,
    Workbench,
    assert_holds,
    attach_component,
    make_model,
    prepared,
    tensor_bytes,
    toy_tensors,
)
from tests.loader.test_loader_faults import refused


def part(model: pb.Model, name: str) -> pb.Component:
    return next(component for component in model.components if component.name == name)


async def gone(*paths: Path) -> None:
    """Wait until the loader has removed these."""
    async with asyncio.timeout(20):
        while any(path.exists() for path in paths):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def replace_text_encoder(folder: Path, seed: int) -> Tensors:
    """Another file of the same shapes under the same name, as a download would put it there."""
    tensors = toy_tensors(seed, 3)
    save_file(tensors, folder / "text_encoder" / "new.tmp")
    (folder / "text_encoder" / "new.tmp").rename(folder / "text_encoder" / "model.safetensors")
    return tensors


def test_models_are_added_removed_and_replaced_by_sighup(bench: Workbench) -> None:
    """Watchers hear of each; what a reader maps of a removed model stays right, and goes when the reader does."""
    a = bench.add_model("a", seed=1)
    bench.add_model("b", seed=2)

    async def use(pid: int) -> None:
        async with LoaderClient(bench.address) as client:
            old_a, old_b = await prepared(client, "a"), await prepared(client, "b")
            mapped = attach_component(bench, old_a, "transformer")
            watch = client.watch("sampler-1")
            assert {model.name for model in (await anext(watch)).models} == {"a", "b"}

            del bench.folders["a"]
            new_b = make_model(bench.disk / "b2", seed=3)
            bench.folders["b"] = bench.disk / "b2"
            new_c = bench.add_model("c", seed=4)
            bench.write_models()
            os.kill(pid, signal.SIGHUP)

            news = await anext(watch)
            assert news.removed == ["a"]
            assert {model.name: model.state for model in news.models} == {
                "b": pb.RESIDENCY_STATE_ABSENT,
                "c": pb.RESIDENCY_STATE_ABSENT,
            }
            await refused(prepared(client, "a"), errors.UnknownModel, "known: b, c")
            await gone(*(bench.arena_dir / component.arena for component in old_b.components))
            for name, tensors in (("b", new_b), ("c", new_c)):
                model = await prepared(client, name)
                with attach_component(bench, model, "transformer") as arena:
                    assert_holds(arena, tensors["transformer"])

            assert_holds(mapped, a["transformer"])
            file = bench.arena_dir / part(old_a, "transformer").arena
            assert file.exists()
            mapped.close()
            await gone(file, bench.arena_dir / old_a.config)
            await watch.aclose()

    with bench.loader() as process:
        asyncio.run(use(process.pid))


def test_replaced_files_are_a_new_generation_at_the_next_prepare(bench: Workbench) -> None:
    """Only of the component whose file it is; who maps the old one keeps its bytes until it lets go."""
    old = bench.add_model("toy")

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            before = await prepared(client, "toy")
            mapped = attach_component(bench, before, "text_encoder")
            new = replace_text_encoder(bench.folders["toy"], seed=77)

            after = await prepared(client, "toy")

            assert part(after, "transformer").generation == part(before, "transformer").generation
            assert part(after, "text_encoder").generation != part(before, "text_encoder").generation
            assert part(after, "text_encoder").identity != part(before, "text_encoder").identity
            with attach_component(bench, after, "text_encoder") as arena:
                assert_holds(arena, new)
            assert_holds(mapped, old["text_encoder"])
            mapped.close()
            await gone(bench.arena_dir / part(before, "text_encoder").arena)

    with bench.loader():
        asyncio.run(use())


def test_a_model_whose_disk_is_gone_is_served_from_memory(bench: Workbench) -> None:
    """Files that are not there have not changed: a sampler that comes now needs no disk."""
    tensors = bench.add_model("toy")

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            await prepared(client, "toy")
            shutil.rmtree(bench.folders["toy"])
            with attach_component(bench, await prepared(client, "toy"), "transformer") as arena:
                assert_holds(arena, tensors["transformer"])

    with bench.loader():
        asyncio.run(use())


def test_a_file_that_cannot_be_used_changes_nothing(bench: Workbench) -> None:
    """BAD_CONFIG, said without a path; models are served as before, and the mended file is taken."""
    bench.add_model("a")

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            before = await prepared(client, "a")
            (bench.disk / "models.toml").write_text("[models.a]\nfolder = 7\n")
            await refused(client.reload(), errors.BadConfig, "nothing was changed")
            assert "needs folder = " in bench.log.read_text()
            assert await client.get_model("a") == before

            bench.add_model("b", seed=2)
            bench.write_models()
            answer = await client.reload()
            assert (list(answer.added), list(answer.removed), list(answer.changed)) == (["b"], [], [])
            assert await client.get_model("a") == before
            assert not (await client.reload()).added

    with bench.loader():
        asyncio.run(use())


def test_another_setting_or_config_reads_no_weights_again(bench: Workbench) -> None:
    """`pin` and the small files may change; the arenas are the same ones, the config folder is a new one."""
    tensors = bench.add_model("toy")

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            before = await prepared(client, "toy")
            mapped = attach_component(bench, before, "transformer")
            bench.options["toy"] = "pin = true"
            bench.write_models()
            assert list((await client.reload()).changed) == ["toy"]
            assert await client.get_model("toy") == before

            (bench.folders["toy"] / "scheduler" / "scheduler_config.json").write_text('{"shift": 3}')
            assert list((await client.reload()).changed) == ["toy"]
            after = await prepared(client, "toy")
            assert after.read_bytes == tensor_bytes(tensors)
            assert [c.generation for c in after.components] == [c.generation for c in before.components]
            assert after.config != before.config
            new = bench.arena_dir / after.config / "scheduler" / "scheduler_config.json"
            assert new.read_text() == '{"shift": 3}'
            assert (bench.arena_dir / before.config).exists()  # who maps the model may still read it
            mapped.close()
            await gone(bench.arena_dir / before.config)

    with bench.loader():
        asyncio.run(use())


def test_eager_loaders_fill_what_is_added(bench: Workbench) -> None:
    """Nobody has to ask for it."""
    bench.add_model("a")

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            bench.add_model("b", seed=2)
            bench.write_models()
            await client.reload()
            async for news in client.watch("test", ["b"]):
                if news.models[0].state == pb.RESIDENCY_STATE_READY:
                    break

    with bench.loader("--eager-load"):
        asyncio.run(use())


def test_an_arena_of_a_dead_loader_goes_with_its_last_reader(bench: Workbench) -> None:
    """Its model's files changed while no loader ran: it stays as long as it is mapped, and no longer."""
    old = bench.add_model("toy")

    async def map_it() -> tuple[AttachedArena, Path]:
        async with LoaderClient(bench.address) as client:
            component = part(await prepared(client, "toy"), "text_encoder")
            path = bench.arena_dir / component.arena
            return attach(path, component.generation), path

    with bench.loader() as process:
        mapped, path = asyncio.run(map_it())
        process.kill()
    replace_text_encoder(bench.folders["toy"], seed=78)
    with bench.loader():
        assert path.exists()
        assert_holds(mapped, old["text_encoder"])
        mapped.close()
        asyncio.run(gone(path))
