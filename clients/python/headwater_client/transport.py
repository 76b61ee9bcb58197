"""The two ways to wait, one protocol. With wire.py and assembly.py the only reader of generated code.

The client is written once, as coroutines over a Transport. Under Asyncio they suspend as usual. Under Blocking no
method ever suspends: it waits in its thread, so a coroutine runs to its end in one go (see run), without a loop, a
second thread, or generated code.
"""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio
from headwater.sampler.v1 import sampler_pb2_grpc

T = TypeVar("T")

OPTIONS = (
    # A dead peer is noticed in 15 s. The server allows pings from 5 s on.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    # Three reference images and a mask at 16 MiB each: above this, gRPC's own transparent retry is off.
    ("grpc.per_rpc_retry_buffer_size", 65 << 20),
    # A server that comes back is found again quickly.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)


class Transport(Protocol):
    """How to connect and how to wait. What it raises is grpc.RpcError."""

    def channel(self, address: str) -> Any:
        """Open a channel; it connects at the first call."""

    def unary(self, method: Any, request: Any, timeout: float | None) -> Any:
        """Begin a unary call."""

    async def reply(self, call: Any) -> Any:
        """The answer of a unary call."""

    async def read(self, call: Any) -> Any:
        """The next message of a stream; None at its end."""

    async def sleep(self, seconds: float) -> None:
        """Wait."""

    async def close(self, channel: Any) -> None:
        """Close a channel that has no calls left."""


class Blocking:
    """Waits in the calling thread."""

    def channel(self, address: str) -> Any:
        """As Transport."""
        return grpc.insecure_channel(address, OPTIONS)

    def unary(self, method: Any, request: Any, timeout: float | None) -> Any:
        """As Transport."""
        return method.future(request, timeout=timeout)

    async def reply(self, call: Any) -> Any:
        """As Transport."""
        try:
            return call.result()
        except grpc.FutureCancelledError:
            raise call from None

    async def read(self, call: Any) -> Any:
        """As Transport."""
        return next(call, None)

    async def sleep(self, seconds: float) -> None:
        """As Transport."""
        time.sleep(seconds)  # noqa: ASYNC251 - never on a loop

    async def close(self, channel: Any) -> None:
        """As Transport."""
        channel.close()


class Asyncio:
    """Waits on the running loop, to which its channels belong."""

    def channel(self, address: str) -> Any:
        """As Transport."""
        return grpc.aio.insecure_channel(address, OPTIONS)

    def unary(self, method: Any, request: Any, timeout: float | None) -> Any:
        """As Transport."""
        return method(request, timeout=timeout)

    async def reply(self, call: Any) -> Any:
        """As Transport."""
        try:
            return await call
        except asyncio.CancelledError:
            raise _whose_cancel(call) from None

    async def read(self, call: Any) -> Any:
        """As Transport."""
        try:
            message = await call.read()
        except asyncio.CancelledError:
            raise _whose_cancel(call) from None
        return None if message is grpc.aio.EOF else message

    async def sleep(self, seconds: float) -> None:
        """As Transport."""
        await asyncio.sleep(seconds)

    async def close(self, channel: Any) -> None:
        """As Transport."""
        await channel.close()


def _whose_cancel(call: Any) -> BaseException:
    """grpc.aio raises CancelledError also for a call that ended as CANCELLED while nobody cancelled the task."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        call.cancel()
        return asyncio.CancelledError()
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(grpc.StatusCode.CANCELLED, nothing, nothing, "the call was cancelled")


def stub(channel: Any) -> Any:
    """The service's methods on a channel of either kind."""
    return sampler_pb2_grpc.SamplerServiceStub(channel)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine over Blocking, which never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    coroutine.close()
    raise AssertionError("a coroutine over Blocking suspended")
