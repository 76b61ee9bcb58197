"""Who may call the loader: the kernel says who connects, whatever the socket's mode has become."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from services import errors
from services.rpc.loader_client import LoaderClient
from tests.loader.support import Workbench, environment, prepared, terminate
from tests.loader.test_loader_faults import refused

NOBODY = 65534
CALL = """
import os, sys, grpc
from headwater.loader.v1 import loader_pb2, loader_pb2_grpc
os.setgroups([]); os.setgid(65534); os.setuid(65534)
with grpc.insecure_channel(sys.argv[1]) as channel:
    try:
        print(len(loader_pb2_grpc.LoaderServiceStub(channel).ListModels(loader_pb2.ListModelsRequest()).models))
    except grpc.RpcError as error:
        print(error.code().name, error.details())
"""

WATCH = """
import sys, grpc
from headwater.loader.v1 import loader_pb2, loader_pb2_grpc
own = [("grpc.use_local_subchannel_pool", 1)]  # a connection each
channels = [grpc.insecure_channel(sys.argv[1], options=own) for _ in range(50)]
stubs = [loader_pb2_grpc.LoaderServiceStub(channel) for channel in channels]
watches = [stub.WatchResidency(loader_pb2.WatchResidencyRequest()) for stub in stubs]
print(sum(len(next(watch).models) for watch in watches), flush=True)
next(watches[0])
"""
ENVIRONMENT = environment()


def call_as_nobody(bench: Workbench) -> str:
    """What another user gets who can reach the socket."""
    bench.memory.chmod(0o755)
    (bench.memory / "loader.sock").chmod(0o666)
    command = [sys.executable, "-c", CALL, bench.address]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_turned_away_unless_allowed(bench: Workbench) -> None:
    """PERMISSION_DENIED with who it was, also where the socket's mode lets everybody connect."""
    bench.add_model("toy")
    with bench.loader() as process:
        assert call_as_nobody(bench) == f"PERMISSION_DENIED user {NOBODY} may not call here: see --allow-uid"
        terminate(process)
    with bench.loader("--allow-uid", str(NOBODY)):
        assert call_as_nobody(bench) == "1"


def test_nobody_comes_by_another_way(bench: Workbench) -> None:
    """The server's own socket is in a folder for its user alone, and a call that comes there directly is refused."""
    bench.add_model("toy")

    async def use() -> None:
        async with LoaderClient(f"unix:{bench.arena_dir}/.loader.sock") as client:
            await refused(client.get_model("toy"), errors.NotAllowed, "by the door")
            await refused(anext(client.watch("x")), errors.NotAllowed, "by the door")
            await refused(prepared(client, "toy"), errors.NotAllowed, "by the door")

    with bench.loader():
        assert bench.arena_dir.stat().st_mode & 0o777 == 0o700
        assert (bench.arena_dir / ".loader.sock").stat().st_mode & 0o777 == 0o600
        asyncio.run(use())


def test_many_callers_that_vanish_leave_nothing(bench: Workbench) -> None:
    """Fifty connections that watch are killed, fifty more send half a greeting; others are served on."""
    bench.add_model("toy")

    async def use(pid: int) -> None:
        async with LoaderClient(bench.address) as client:
            await client.list_models()
            before = count_descriptors(pid)
            watchers = await asyncio.create_subprocess_exec(
                sys.executable, "-c", WATCH, bench.address, stdout=subprocess.PIPE, env=ENVIRONMENT
            )
            assert watchers.stdout
            assert await watchers.stdout.readline() == b"50\n"
            assert count_descriptors(pid) >= before + 50
            for _ in range(50):
                with socket.socket(socket.AF_UNIX) as caller:
                    caller.connect(bench.address.removeprefix("unix:"))
                    caller.send(b"PRI * HTTP/2.0")
            watchers.kill()
            await watchers.wait()
            await prepared(client, "toy")
            await client.evict("toy")
            async with asyncio.timeout(20):
                while count_descriptors(pid) > before:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)

    with bench.loader() as process:
        asyncio.run(use(process.pid))


def count_descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def test_a_port_has_no_door(bench: Workbench) -> None:
    """Who can reach it may call: the operator chose so."""
    bench.add_model("toy")

    async def use(address: str) -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            await channel.channel_ready()
        async with LoaderClient(address) as client:
            assert len(await client.list_models()) == 1

    with bench.loader("--listen", "127.0.0.1:0"):
        line = next(line for line in bench.log.read_text().splitlines() if "event=serving" in line)
        asyncio.run(use(line.partition("address=")[2].split()[0]))
        assert not (bench.arena_dir / ".loader.sock").exists()
