"""A loader that stands still: alive, and of no use for the moment."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from headwater.loader.v1 import loader_pb2 as pb

from services.rpc.loader_client import LoaderClient
from tests.loader.support import Workbench, assert_holds, attach_component, prepared

PATIENCE_S = 0.5


@contextmanager
def frozen(process: subprocess.Popen[str]) -> Iterator[None]:
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def second_loader(bench: Workbench) -> int:
    """How another loader for the same folder ends."""
    process = bench.start("--listen", f"unix:{bench.memory}/second.sock")
    try:
        return process.wait(20)
    finally:
        process.kill()


async def within(patience_s: float, client: LoaderClient) -> pb.Model:
    async with asyncio.timeout(patience_s):
        return await prepared(client, "toy")


def test_a_frozen_loader_still_owns_its_folder_and_its_readers_read_on(bench: Workbench) -> None:
    """Its callers wait as long as they like, a second loader is sent away; thawed, it is as if nothing had been."""
    tensors = bench.add_model("toy")

    async def use(process: subprocess.Popen[str]) -> None:
        async with LoaderClient(bench.address) as client:
            model = await prepared(client, "toy")
            with attach_component(bench, model, "transformer") as arena:
                with frozen(process):
                    with pytest.raises(TimeoutError):
                        await within(PATIENCE_S, client)
                    assert await asyncio.to_thread(second_loader, bench) == 1
                    assert "another loader owns" in bench.log.read_text()
                    assert_holds(arena, tensors["transformer"])
                    with attach_component(bench, model, "text_encoder") as other:
                        assert_holds(other, tensors["text_encoder"])
                after = await within(10, client)
                assert [part.generation for part in after.components] == [part.generation for part in model.components]
                assert after.read_bytes == model.read_bytes

    with bench.loader() as process:
        asyncio.run(use(process))
