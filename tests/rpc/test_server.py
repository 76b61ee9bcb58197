"""A server's life: health, reflection, addresses, drain."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from headwater.loader.v1 import loader_pb2 as pb
from headwater.loader.v1 import loader_pb2_grpc

from services.rpc.server import (
    NOT_SERVING,
    SERVING,
    Health,
    add_health,
    add_reflection,
    bind,
    build_server,
    run_until_signal,
)

NAME = "headwater.loader.v1.LoaderService"


class Slow(loader_pb2_grpc.LoaderServiceServicer):
    """GetModel takes `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        await asyncio.sleep(self._seconds)
        return pb.GetModelResponse()


Use = Callable[[grpc.aio.Server, Health, grpc.aio.Channel, str], Awaitable[None]]


def serve(address: str, use: Use, seconds: float = 0) -> None:
    async def run() -> None:
        serve_it = serving(address, seconds)
        async with serve_it as (server, health, bound), grpc.aio.insecure_channel(bound) as channel:
            await use(server, health, channel, bound)

    asyncio.run(run())


@contextlib.asynccontextmanager
async def serving(address: str, seconds: float) -> AsyncIterator[tuple[grpc.aio.Server, Health, str]]:
    server = build_server()
    loader_pb2_grpc.add_LoaderServiceServicer_to_server(Slow(seconds), server)  # type: ignore[arg-type]
    health = add_health(server, NAME)
    add_reflection(server, NAME)
    bound = bind(server, address)
    await server.start()
    try:
        yield server, health, bound
    finally:
        await server.stop(None)


def test_health_is_not_serving_first_and_watchers_hear_of_changes(tmp_path: Path) -> None:
    """For the server and the service; an unknown name is NOT_FOUND; a drain ends the watch."""

    async def use(server: grpc.aio.Server, health: Health, channel: grpc.aio.Channel, bound: str) -> None:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", NAME):
            assert (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="other"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=NAME))
        assert (await watch.read()).status == NOT_SERVING
        await health.set_all(SERVING)
        assert (await watch.read()).status == SERVING
        await health.enter_graceful_shutdown()
        assert (await watch.read()).status == NOT_SERVING
        assert await watch.read() is grpc.aio.EOF
        await health.set(NAME, SERVING)
        assert (await stub.Check(health_pb2.HealthCheckRequest(service=NAME))).status == NOT_SERVING

    serve(f"unix:{tmp_path}/s.sock", use)


def test_reflection_lists_the_services(tmp_path: Path) -> None:
    async def use(server: grpc.aio.Server, health: Health, channel: grpc.aio.Channel, bound: str) -> None:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        names = {service.name for service in (await call.read()).list_services_response.service}
        assert {NAME, "grpc.health.v1.Health"} <= names

    serve(f"unix:{tmp_path}/s.sock", use)


def test_port_0_is_replaced_and_a_port_in_use_is_refused() -> None:
    """The second server fails instead of sharing the port."""

    async def use(server: grpc.aio.Server, health: Health, channel: grpc.aio.Channel, bound: str) -> None:
        assert not bound.endswith(":0")
        await loader_pb2_grpc.LoaderServiceStub(channel).GetModel(pb.GetModelRequest())
        with pytest.raises(OSError, match="cannot listen"):
            bind(build_server(), bound)

    serve("127.0.0.1:0", use)


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    async def run() -> None:
        (tmp_path / "s.sock").write_text("precious")
        with pytest.raises(OSError, match="no socket"):
            bind(build_server(), f"unix:{tmp_path}/s.sock")
        assert (tmp_path / "s.sock").read_text() == "precious"

    asyncio.run(run())


@pytest.mark.parametrize(("seconds", "grace_s", "ends_well"), [(0.5, 20.0, True), (30.0, 0.3, False)])
def test_a_signal_drains(tmp_path: Path, seconds: float, grace_s: float, ends_well: bool) -> None:
    """Running calls finish inside the grace and not a moment is waited after them; longer ones are UNAVAILABLE."""

    async def use(server: grpc.aio.Server, health: Health, channel: grpc.aio.Channel, bound: str) -> None:
        stub = loader_pb2_grpc.LoaderServiceStub(channel)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        call = asyncio.create_task(_code(stub.GetModel(pb.GetModelRequest())))
        stopped: list[bool] = []
        asyncio.get_running_loop().call_later(0.2, os.kill, os.getpid(), signal.SIGTERM)
        start = time.monotonic()
        await run_until_signal(server, health, grace_s, lambda: stopped.append(True), bound)
        assert time.monotonic() - start < 15  # neither the grace nor the slow call was sat out
        assert stopped == [True]
        assert (await call is grpc.StatusCode.OK) is ends_well
        assert not (tmp_path / "s.sock").exists()

    serve(f"unix:{tmp_path}/s.sock", use, seconds)


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    """Even an `on_stop` that hangs is given up."""

    async def use(server: grpc.aio.Server, health: Health, channel: grpc.aio.Channel, bound: str) -> None:
        call = asyncio.create_task(_code(loader_pb2_grpc.LoaderServiceStub(channel).GetModel(pb.GetModelRequest())))
        for delay in (0.2, 0.5):
            asyncio.get_running_loop().call_later(delay, os.kill, os.getpid(), signal.SIGINT)
        await asyncio.wait_for(run_until_signal(server, health, 60, lambda: asyncio.sleep(60), bound), 15)
        assert await call is not grpc.StatusCode.OK

    serve(f"unix:{tmp_path}/s.sock", use, 60)


async def _code(call: Any) -> grpc.StatusCode:
    with contextlib.suppress(grpc.aio.AioRpcError):
        await call
    code: grpc.StatusCode = await call.code()
    return code
