"""A loader's life: killed and followed by another, stopped, refused at start."""

import asyncio
import os
import signal
import socket

import pytest
from headwater.loader.v1 import loader_pb2 as pb

from services.errors import LoaderGone, ShuttingDown
from services.params.arena import AttachedArena
from services.rpc.loader_client import LoaderClient
from tests.loader.support import Workbench, assert_holds, attach_component, prepared, tensor_bytes, terminate


async def fill_partly(bench: Workbench, extent_count: int) -> tuple[pb.Model, AttachedArena]:
    """Prepare until some extents are READY; the transformer's arena, attached."""
    async with LoaderClient(bench.address) as client:
        ready = 0
        async for message in client.prepare("toy", [("transformer", [])]):
            if message.model.name:
                model = message.model
            ready += sum(len(part.extents) for part in message.ready)
            if ready >= extent_count:
                break
    return model, attach_component(bench, model, "transformer")


def bytes_outside(arena: AttachedArena) -> int:
    return sum(tensor.size_bytes for tensor in arena.tensors if not arena.is_ready(tensor.extent))


def test_a_killed_loaders_arenas_are_adopted(bench: Workbench) -> None:
    """After kill -9 mid-fill the next loader keeps generation and READY extents and reads only the rest."""
    tensors = bench.add_model("toy")
    with bench.loader("--max-fill-rate", "100KB") as process:
        model, sampler = asyncio.run(fill_partly(bench, 3))
        process.send_signal(signal.SIGKILL)
        process.wait()
    missing = bytes_outside(sampler)
    assert 0 < missing < tensor_bytes({"transformer": tensors["transformer"]})

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            after = await prepared(client, "toy")
            assert [part.generation for part in after.components] == [part.generation for part in model.components]
            assert after.read_bytes == missing + tensor_bytes({"text_encoder": tensors["text_encoder"]})
            assert_holds(sampler, tensors["transformer"])  # mapped before the crash
            with attach_component(bench, after, "transformer") as arena:
                assert_holds(arena, tensors["transformer"])

    with bench.loader():
        asyncio.run(use())
    sampler.close()


def test_a_whole_adopted_model_is_not_read_again(bench: Workbench) -> None:
    """Verified from memory; nothing but headers is read."""
    tensors = bench.add_model("toy")

    async def first() -> None:
        async with LoaderClient(bench.address) as client:
            await prepared(client, "toy")

    async def second() -> None:
        async with LoaderClient(bench.address) as client:
            model = await prepared(client, "toy")
            assert model.read_bytes == 0
            assert model.config
            with attach_component(bench, model, "text_encoder") as arena:
                assert_holds(arena, tensors["text_encoder"])

    with bench.loader() as process:
        asyncio.run(first())
        process.kill()
    with bench.loader() as process:
        asyncio.run(second())
        assert terminate(process) == 0
    assert not list(bench.memory.iterdir())  # the folder too, though the dead one made it


def test_a_damaged_extent_is_found_and_filled_again(bench: Workbench) -> None:
    """One flipped bit in memory, and the digest of that extent does not match: only it is read again."""
    tensors = bench.add_model("toy")
    with bench.loader() as process:
        model, sampler = asyncio.run(fill_partly(bench, 20))
        process.kill()
    victim = next(tensor for tensor in sampler.tensors if tensor.name == "blocks.3.weight")
    path = bench.arena_dir / next(part.arena for part in model.components if part.name == "transformer")
    start = path.stat().st_size - sampler.size_bytes + victim.offset
    raw = path.read_bytes()[start]
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes([raw ^ 1]))

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            after = await prepared(client, "toy")
            with attach_component(bench, after, "transformer") as arena:
                assert_holds(arena, tensors["transformer"])
            in_extent = (t.size_bytes for t in sampler.tensors if t.extent == victim.extent)
            assert after.read_bytes == sum(in_extent)

    with bench.loader():
        asyncio.run(use())
    sampler.close()


def test_a_replaced_checkpoint_is_never_served_from_an_old_arena(bench: Workbench) -> None:
    """Same names, same shapes, other bytes: identity differs, the old arena goes unless a sampler maps it."""
    bench.add_model("toy")
    with bench.loader() as process:
        _, sampler = asyncio.run(fill_partly(bench, 20))
        process.kill()
    ready = sampler.ready_bytes
    folder = bench.folders["toy"]
    folder.rename(folder.with_name("old"))
    tensors = bench.add_model("toy", seed=77)

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            model = await prepared(client, "toy")
            assert model.read_bytes == tensor_bytes(tensors)
            with attach_component(bench, model, "transformer") as arena:
                assert arena.generation != sampler.generation
                assert_holds(arena, tensors["transformer"])
        assert len(list(bench.arena_dir.glob("text_encoder-*"))) == 1
        assert len(list(bench.arena_dir.glob("transformer-*"))) == 2
        assert sampler.ready_bytes == ready

    with bench.loader():
        asyncio.run(use())
    assert "an old arena stays" in bench.log.read_text()
    sampler.close()


def test_a_stop_leaves_nothing(bench: Workbench) -> None:
    """SIGTERM in the middle of a fill: exit 0, no arena, no config, no lock, no socket, no folder; streams end."""
    bench.add_model("toy")

    async def use(pid: int) -> None:
        async with LoaderClient(bench.address) as client:
            stream = client.prepare("toy")
            await anext(stream)
            assert list(bench.arena_dir.glob("config-*"))
            os.kill(pid, signal.SIGTERM)
            with pytest.raises(ShuttingDown):
                async for _ in stream:
                    pass

    with bench.loader("--max-fill-rate", "20KB") as process:
        asyncio.run(use(process.pid))

        assert process.wait(20) == 0
        assert not list(bench.memory.iterdir())


def test_a_sampler_goes_on_after_the_loader_stopped(bench: Workbench) -> None:
    """The name goes, the mapping stays."""
    tensors = bench.add_model("toy")
    with bench.loader() as process:
        _, sampler = asyncio.run(fill_partly(bench, 20))
        assert terminate(process) == 0
        assert not list(bench.memory.iterdir())

        assert_holds(sampler, tensors["transformer"])
    sampler.close()

    async def ask() -> None:
        async with LoaderClient(bench.address) as client:
            await client.list_models()

    with pytest.raises(LoaderGone, match=r"no loader answers on loader\.sock"):
        asyncio.run(ask())


def test_a_stale_socket_is_replaced_a_live_one_is_not(bench: Workbench) -> None:
    """A crash leaves a socket file; it must not keep the next loader away, nor the next loader take a live one's."""
    bench.add_model("toy")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(bench.memory / "loader.sock"))
    with bench.loader():
        assert (bench.memory / "loader.sock").stat().st_mode & 0o777 == 0o660
        with bench.log.open("w"):
            pass
        other = bench.start("--arena-dir", str(bench.memory / "other"))
        assert other.wait(20) == 1
        assert "a server is listening" in bench.log.read_text()
        assert bench.log.read_text().count("\n") == 1
        assert not (bench.memory / "other").exists()


def test_an_arena_folder_has_one_loader(bench: Workbench) -> None:
    """The second exits 1 with one line and touches nothing."""
    bench.add_model("toy")
    with bench.loader():
        bench.log.write_text("")
        other = bench.start("--listen", f"unix:{bench.memory}/other.sock")
        assert other.wait(20) == 1
        assert "another loader owns" in bench.log.read_text()
        assert bench.log.read_text().count("\n") == 1
        assert not (bench.memory / "other.sock").exists()
        assert (bench.arena_dir / "loader.lock").exists()


def test_what_the_operator_got_wrong_is_one_line(bench: Workbench) -> None:
    """Exit 1 and one clear line without a trace."""
    bench.add_model("toy")
    (bench.disk / "bad.toml").write_text("[models.toy\n")
    cases: list[tuple[tuple[str, ...], str]] = [
        (("--models", "/nonexistent/models.toml"), "cannot read"),
        (("--models", str(bench.disk / "bad.toml")), "no valid TOML"),
        (("--arena-dir", str(bench.disk / "arenas")), "not on a tmpfs"),
        (("--arena-dir", "/proc/headwater"), "on proc, not on a tmpfs"),
        (("--arena-dir", str(bench.memory)), "holds other files"),
        (("--arena-dir", "/nonexistent/arenas"), "cannot use the arena folder"),
        (("--listen", "unix:/nonexistent/folder/l.sock"), "folder of the socket"),
        (("--listen", "unix:/tmp/" + "x" * 200), "at most 107 bytes, this has 205; choose a shorter --listen"),
        (("--listen", "nonsense"), "unix:/path or host:port"),
    ]
    (bench.memory / "config-of-somebody").mkdir()
    for flags, words in cases:
        bench.log.write_text("")
        process = bench.start(*flags)
        assert process.wait(20) == 1, flags
        said = bench.log.read_text()
        assert said.startswith("headwater-loader: ")
        assert words in said
        assert said.count("\n") == 1
        assert not bench.arena_dir.exists()
    assert not (bench.disk / "arenas").exists()
    assert [path.name for path in bench.memory.iterdir()] == ["config-of-somebody"]
