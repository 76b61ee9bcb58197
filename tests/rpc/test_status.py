"""Statuses: one table both ways, over a real server, and nothing leaks."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from google.rpc import error_details_pb2, status_pb2
from headwater.loader.v1 import loader_pb2 as pb
from headwater.loader.v1 import loader_pb2_grpc

from services import errors
from services.rpc.loader_client import LoaderClient
from services.rpc.server import bind, build_server
from services.rpc.status import DOMAIN, INTERNAL_TEXT, TABLE, status_from

PREFIX = "/headwater.loader.v1.LoaderService/"


class Raising(loader_pb2_grpc.LoaderServiceServicer):
    """Answers every call with one exception, streams after one message."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        raise self._error

    async def PrepareParams(self, request: Any, context: Any) -> AsyncIterator[pb.PrepareParamsResponse]:
        yield pb.PrepareParamsResponse(total_bytes=7)
        raise self._error

    async def EvictModel(self, request: Any, context: Any) -> pb.EvictModelResponse:
        await context.abort(grpc.StatusCode.ABORTED, "by hand")
        raise AssertionError

    async def WatchResidency(self, request: Any, context: Any) -> AsyncIterator[pb.WatchResidencyResponse]:
        yield pb.WatchResidencyResponse()
        await asyncio.sleep(60)


def serve(tmp_path: Path, error: BaseException, use: Callable[[LoaderClient, str], Awaitable[None]]) -> None:
    async def run() -> None:
        server = build_server()
        loader_pb2_grpc.add_LoaderServiceServicer_to_server(Raising(error), server)  # type: ignore[arg-type]
        address = bind(server, f"unix:{tmp_path}/s.sock")
        await server.start()
        try:
            async with LoaderClient(address) as client:
                await use(client, address)
        finally:
            await server.stop(None)

    asyncio.run(run())


def every_error() -> list[errors.HeadwaterError]:
    made: dict[type, errors.HeadwaterError] = {
        errors.InvalidRequest: errors.InvalidRequest(("a.b", "too large"), ("c", "missing")),
        errors.QueueFull: errors.QueueFull("queue full", 2.5),
    }
    return [made.get(kind) or kind("what happened") for kind in TABLE]


def leaves(kind: type[errors.HeadwaterError]) -> set[type[errors.HeadwaterError]]:
    below = kind.__subclasses__()
    return set().union(*(leaves(child) for child in below)) if below else {kind}


def test_every_type_has_a_status_and_every_reason_is_its_own() -> None:
    """An error type that is added without a status is found here."""
    assert leaves(errors.HeadwaterError) <= set(TABLE)
    assert len({reason for _, reason in TABLE.values()}) == len(TABLE)
    assert all(reason.isupper() and len(reason) <= 63 for _, reason in TABLE.values())


@pytest.mark.parametrize("error", every_error(), ids=lambda error: type(error).__name__)
def test_an_error_survives_the_wire(error: errors.HeadwaterError, tmp_path: Path) -> None:
    """Unary and stream: the same type, sentence and details on the other side."""

    async def use(client: LoaderClient, address: str) -> None:
        with pytest.raises(type(error)) as unary:
            await client.get_model("x")
        prepare = client.prepare("x")
        assert (await anext(prepare)).total_bytes == 7
        with pytest.raises(type(error)) as stream:
            await anext(prepare)
        for caught in (unary.value, stream.value):
            if not isinstance(error, errors.LoaderGone):  # the client says which loader is gone
                assert str(caught) == str(error)
            assert getattr(caught, "violations", None) == getattr(error, "violations", None)
            assert getattr(caught, "retry_after_s", None) == getattr(error, "retry_after_s", None)

    serve(tmp_path, error, use)


@pytest.mark.parametrize(
    "error", [ValueError("/secret/path 0xdeadbeef"), errors.HeadwaterError("root"), KeyError("k")], ids=repr
)
def test_anything_else_is_internal_with_a_fixed_text(error: Exception, tmp_path: Path) -> None:
    """What Python says stays in the log."""

    async def use(client: LoaderClient, address: str) -> None:
        with pytest.raises(errors.HeadwaterError) as caught:
            await client.get_model("x")
        assert str(caught.value) == f"INTERNAL: {INTERNAL_TEXT}"
        with pytest.raises(errors.HeadwaterError) as caught:
            async for _ in client.prepare("x"):
                pass
        assert str(caught.value) == f"INTERNAL: {INTERNAL_TEXT}"

    with structlog.testing.capture_logs() as lines:
        serve(tmp_path, error, use)
    assert [line["status"] for line in lines if line["event"] == "rpc"] == ["INTERNAL", "INTERNAL"]


def test_bytes_that_are_no_message_are_an_invalid_request(tmp_path: Path) -> None:
    """gRPC alone would answer UNKNOWN with protobuf's text."""

    async def use(client: LoaderClient, address: str) -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            for method in ("GetModel", "EvictModel"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary(PREFIX + method)(b"\xff\xff\xff")
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_stream(PREFIX + "PrepareParams")(b"\x0a\xff").read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    serve(tmp_path, ValueError(), use)


def test_aborts_and_unknown_methods_pass_through(tmp_path: Path) -> None:
    """What a handler or gRPC itself decided is not mapped again."""

    async def use(client: LoaderClient, address: str) -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            for method, code in (("EvictModel", grpc.StatusCode.ABORTED), ("Nothing", grpc.StatusCode.UNIMPLEMENTED)):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary(PREFIX + method)(b"")
                assert caught.value.code() is code

    serve(tmp_path, ValueError(), use)


def test_one_line_for_each_call(tmp_path: Path) -> None:
    """Method, status and duration; a caller that leaves is CANCELLED."""

    async def use(client: LoaderClient, address: str) -> None:
        with pytest.raises(errors.Leased):
            await client.get_model("a secret prompt")
        watch = client.watch("a secret prompt")
        await anext(watch)
        await watch.aclose()
        await asyncio.sleep(0.2)

    with structlog.testing.capture_logs() as lines:
        serve(tmp_path, errors.Leased("held"), use)
    calls = [(line["method"], line["status"]) for line in lines if line["event"] == "rpc"]
    assert calls == [(PREFIX + "GetModel", "FAILED_PRECONDITION"), (PREFIX + "WatchResidency", "CANCELLED")]
    assert "secret" not in repr(lines)
    assert all(line["duration_ms"] >= 0 for line in lines)


def test_a_status_has_error_info_and_at_most_one_more_detail() -> None:
    """AIP-193's shape."""
    for error in every_error():
        status: status_pb2.Status = status_from(error)
        info = error_details_pb2.ErrorInfo()
        assert status.details[0].Unpack(info)
        assert (info.domain, info.reason) == (DOMAIN, TABLE[type(error)][1])
        assert len(status.details) <= 2
