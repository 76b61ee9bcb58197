"""Shared memory under a loader: taken by others, taken again and again, left by the dead, forged."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import xxhash
from headwater.loader.v1 import loader_pb2 as pb

from services.loader.arenas import ArenaDir
from services.loader.catalog import ComponentSource, read_model
from services.loader.entries import ModelEntry
from services.params.arena import ExtentState, attach
from services.params.header import DIGEST_BYTES, Header
from services.params.layout import PAGE
from services.params.owned_arena import OwnedArena
from services.rpc.loader_client import LoaderClient
from tests.loader.support import (
    Workbench,
    assert_holds,
    attach_component,
    component,
    needs_mount,
    prepared,
    tensor_bytes,
)

CYCLES = 300
NOBODY = 65534


@needs_mount
def test_a_fill_ends_though_another_takes_all_memory_that_is_left(bench: Workbench) -> None:
    """What a model needs was reserved before: not a byte less for it, and the right ones."""
    tensors = bench.add_model("toy")

    async def use(folder: Path) -> None:
        async with LoaderClient(bench.address) as client:
            stream = client.prepare("toy")
            await anext(stream)
            with (folder / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
                while ballast.write(bytes(4096)):
                    pass
            assert os.statvfs(folder).f_bavail == 0
            last = [news async for news in stream][-1]
            assert last.done
            for name, expected in tensors.items():
                part = component(last.model, name)
                with attach(folder / part.arena, part.generation) as arena:
                    assert_holds(arena, expected)

    with bench.loader_on_tmpfs("1m", "--max-fill-rate", "400KB") as folder:
        asyncio.run(use(folder))


@needs_mount
def test_three_hundred_cycles_leave_nothing(bench: Workbench) -> None:
    """Prepared and evicted so often, a loader has as many descriptors, mappings and bytes of tmpfs as before."""
    bench.add_model("toy", block_count=2)

    def held(folder: Path) -> tuple[int, int, int]:
        """(descriptors, mappings of arenas, blocks of the tmpfs in use)."""
        process = folder.parents[len(folder.parents) - 3]  # /proc/PID
        maps = (process / "maps").read_text().count(".arena")
        room = os.statvfs(folder)
        return len(list((process / "fd").iterdir())), maps, room.f_blocks - room.f_bfree

    async def use(folder: Path) -> None:
        async with LoaderClient(bench.address) as client:
            after: list[tuple[int, int, int]] = []
            for cycle in range(CYCLES):
                await prepared(client, "toy")
                assert await client.evict("toy") > 0
                if cycle in (CYCLES // 10, CYCLES - 1):
                    after.append(held(folder))
            assert after[0] == after[1]
            assert after[1][1] == 0

    with bench.loader_on_tmpfs("4m") as folder:
        asyncio.run(use(folder))


def source_of(bench: Workbench, name: str, part: str = "transformer") -> ComponentSource:
    parts = read_model(ModelEntry(name, bench.folders[name]), 16384).components
    return next(source for source in parts if source.name == part)


def left_behind(bench: Workbench, header: Header) -> Path:
    """An arena that says that all its extents are READY; they hold zeros, with the right digests of them."""
    bench.arena_dir.mkdir(mode=0o700, exist_ok=True)
    (bench.arena_dir / "loader.lock").touch()
    arena = OwnedArena.create(bench.arena_dir / f"{header.component}-{header.generation}.arena", header)
    arena.reserve()
    for extent in range(len(header.layout.extents)):
        with arena.window(extent) as memory:
            arena.publish(extent, xxhash.xxh3_128_digest(memory))
    arena.close()
    return arena.path


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")


async def model_of(bench: Workbench) -> pb.Model:
    async with LoaderClient(bench.address) as client:
        return await prepared(client, "toy")


def test_what_dead_loaders_left_goes_unless_it_is_leased(bench: Workbench) -> None:
    """Five generations of files that are no more: four go at the start, the one that a reader maps is named."""
    bench.add_model("toy")
    source = source_of(bench, "toy")
    headers = [Header("transformer", f"{n:032x}", boot_id(), f"{n:032x}", source.layout) for n in range(5)]
    paths = [left_behind(bench, header) for header in headers]

    with attach(paths[2], headers[2].generation), bench.loader():
        assert list(bench.arena_dir.glob("*.arena")) == [paths[2]]
    assert f'"an old arena stays: a sampler maps it" arena={paths[2].name}' in bench.log.read_text()


def ours(bench: Workbench, boot: str = "") -> Path:
    """An arena that a loader takes for its own."""
    source = source_of(bench, "toy")
    return left_behind(bench, Header("transformer", "ab" * 16, boot or boot_id(), source.identity, source.layout))


def of_another_version(bench: Workbench) -> Path:
    path = ours(bench)
    with path.open("r+b") as file:
        page = bytearray(file.read(PAGE))
        page[8] += 1
        page[-DIGEST_BYTES:] = xxhash.xxh3_128_digest(page[:-DIGEST_BYTES])
        file.seek(0)
        file.write(page)
    return path


def of_another_boot(bench: Workbench) -> Path:
    return ours(bench, boot="cd" * 16)


def of_another_user(bench: Workbench) -> Path:
    if os.geteuid():
        pytest.skip("needs the right to give a file away")
    path = ours(bench)
    os.chown(path, NOBODY, NOBODY)
    return path


@pytest.mark.parametrize("make", [of_another_version, of_another_boot, of_another_user])
def test_an_arena_that_is_not_ours_is_made_anew(bench: Workbench, make: Callable[[Workbench], Path]) -> None:
    """Of another version, from before a reboot, or put there by another user: not a byte of it is served."""
    tensors = bench.add_model("toy")
    path = make(bench)

    with bench.loader():
        model = asyncio.run(model_of(bench))
        assert not path.exists()
        assert model.read_bytes == tensor_bytes(tensors)
        with attach_component(bench, model, "transformer") as arena:
            assert_holds(arena, tensors["transformer"])


def test_the_same_arena_of_our_own_is_adopted(bench: Workbench) -> None:
    """What the test above leans on: but for the one difference, its files would have been believed."""
    bench.add_model("toy")
    path = ours(bench)

    with bench.loader():
        model = asyncio.run(model_of(bench))
        assert component(model, "transformer").arena == path.name
        with attach_component(bench, model, "transformer") as arena:
            assert arena.state(0) is ExtentState.READY


def test_a_lock_file_that_names_a_living_process_keeps_nobody_away(bench: Workbench) -> None:
    """Who owns the folder is the kernel's lock alone: no number can be another process's by chance."""
    bench.arena_dir.mkdir(mode=0o700)
    (bench.arena_dir / "loader.lock").write_text(f"{os.getpid()}\n")

    ArenaDir.open(bench.arena_dir).close()
