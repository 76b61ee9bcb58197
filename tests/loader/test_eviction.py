"""What an eviction takes from readers, and what it gives back to the host."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from headwater.loader.v1 import loader_pb2 as pb

from services.errors import HostMemoryFull, Leased
from services.rpc.loader_client import LoaderClient
from tests.loader.puppet import puppet
from tests.loader.support import Workbench, component, needs_mount, prepared

pytestmark = needs_mount
EDGE_BYTES = 64 << 10  # lock file, config folder


def used_bytes(folder: Path) -> int:
    room = os.statvfs(folder)
    return (room.f_blocks - room.f_bfree) * room.f_frsize


def run(bench: Workbench, use: Callable[[LoaderClient, Path, pb.Model], Awaitable[None]], size: str = "4m") -> None:
    """A loader on a tmpfs of its own, with "toy" prepared."""

    async def call(folder: Path) -> None:
        async with LoaderClient(bench.address) as client:
            await use(client, folder, await prepared(client, "toy"))

    bench.add_model("toy", width=128)
    with bench.loader_on_tmpfs(size) as folder:
        asyncio.run(call(folder))


def test_pages_that_a_reader_keeps_in_memory_are_spared_and_come_back_after_it(bench: Workbench) -> None:
    """While it leases, the model cannot be evicted and is unharmed; once it has let go, the memory is free again."""

    async def use(client: LoaderClient, folder: Path, model: pb.Model) -> None:
        part = component(model, "transformer")
        full = used_bytes(folder)
        with puppet(folder / part.arena, part.generation) as reader:
            digest = reader.tell("digest")
            assert int(reader.tell("lock")) << 10 >= part.size_bytes
            with pytest.raises(Leased, match="in use by a sampler"):
                await client.evict("toy")
            assert used_bytes(folder) == full
            assert (await client.get_model("toy")).state == pb.RESIDENCY_STATE_READY
            assert reader.tell("digest") == digest

            assert reader.tell("unlock") == "0"
            reader.tell("close")
            reader.tell("drop")
            assert await client.evict("toy") >= full - EDGE_BYTES
            assert used_bytes(folder) < EDGE_BYTES

    run(bench, use)


def test_a_mapping_that_outlives_its_lease_keeps_its_bytes(bench: Workbench) -> None:
    """The model goes, the reader's bytes do not turn into others or zeros, and their memory is free when it unmaps."""

    async def use(client: LoaderClient, folder: Path, model: pb.Model) -> None:
        part = component(model, "transformer")
        with puppet(folder / part.arena, part.generation) as reader:
            digest = reader.tell("digest")
            reader.tell("close")
            await client.evict("toy")
            assert not list(folder.glob("*.arena"))
            assert used_bytes(folder) >= part.size_bytes
            assert reader.tell("digest") == digest

            await prepared(client, "toy")
            assert reader.tell("digest") == digest
            await client.evict("toy")
            reader.tell("drop")
            assert used_bytes(folder) < EDGE_BYTES

    run(bench, use)


def test_memory_that_only_mappings_hold_counts_as_taken(bench: Workbench) -> None:
    """Generations that are gone and still mapped: in the end there is no room, which is said; after them there is."""

    async def use(client: LoaderClient, folder: Path, model: pb.Model) -> None:
        async def mapped_and_gone(count: int) -> None:
            """Map `count` generations, one in the other's place, and ask for one more."""
            if not count:
                await prepared(client, "toy")
                return
            part = component(await prepared(client, "toy"), "transformer")
            with puppet(folder / part.arena, part.generation) as reader:
                reader.tell("close")
                await client.evict("toy")
                await mapped_and_gone(count - 1)

        with pytest.raises(HostMemoryFull, match="MiB needed"):
            await mapped_and_gone(5)
        assert used_bytes(folder) < EDGE_BYTES
        await prepared(client, "toy")

    run(bench, use, "2m")
