"""The loader as its callers see it: typed calls, and exceptions of services/errors.py instead of statuses."""

from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import grpc
from headwater.loader.v1 import loader_pb2, loader_pb2_grpc

from services.errors import HeadwaterError, LoaderGone
from services.rpc.server import KEEPALIVE
from services.rpc.status import error_from

LoaderModel = loader_pb2.Model
PrepareNews = loader_pb2.PrepareParamsResponse
ResidencyNews = loader_pb2.WatchResidencyResponse
PRIORITY_LOW, PRIORITY_NORMAL, PRIORITY_HIGH = (
    loader_pb2.PRIORITY_LOW,
    loader_pb2.PRIORITY_NORMAL,
    loader_pb2.PRIORITY_HIGH,
)

_RECONNECT = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1_000))


class LoaderClient:
    """Calls to the loader at `address` (`unix:/path` or `host:port`); use as an async context manager.

    Every call may raise LoaderGone. Leaving a stream's loop early cancels the call: its caller wants no more.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._name = address.rsplit("/", 1)[-1]

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(self._address, options=[*KEEPALIVE, *_RECONNECT])
        self._stub = loader_pb2_grpc.LoaderServiceStub(self._channel)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def list_models(self) -> list[loader_pb2.Model]:
        with self._errors():
            return list((await self._stub.ListModels(loader_pb2.ListModelsRequest())).models)

    async def get_model(self, name: str) -> loader_pb2.Model:
        """Raises UnknownModel."""
        with self._errors():
            return (await self._stub.GetModel(loader_pb2.GetModelRequest(model=name))).model

    async def prepare(
        self,
        name: str,
        order: Iterable[tuple[str, Sequence[int]]] = (),
        priority: loader_pb2.Priority.ValueType = PRIORITY_NORMAL,
        replica: str = "",
    ) -> AsyncGenerator[PrepareNews, None]:
        """Messages of a fill until `done`; `order` is (component, extents). Raises what PrepareParams answers."""
        selections = [loader_pb2.ExtentSelection(component=c, extents=extents) for c, extents in order]
        request = loader_pb2.PrepareParamsRequest(model=name, order=selections, priority=priority, replica=replica)
        call = self._stub.PrepareParams(request)
        with self._errors(), _cancelling(call):
            async for response in call:
                yield response

    async def evict(self, name: str) -> int:
        """Bytes given back. Raises UnknownModel, Leased."""
        with self._errors():
            return (await self._stub.EvictModel(loader_pb2.EvictModelRequest(model=name))).freed_bytes

    async def reload(self) -> loader_pb2.ReloadModelsResponse:
        """Have models.toml read again. Raises BadConfig."""
        with self._errors():
            return await self._stub.ReloadModels(loader_pb2.ReloadModelsRequest())

    async def watch(
        self, replica: str = "", models: Iterable[str] = ()
    ) -> AsyncGenerator[loader_pb2.WatchResidencyResponse, None]:
        """States of models now, then changes, until the caller leaves or the loader stops."""
        call = self._stub.WatchResidency(loader_pb2.WatchResidencyRequest(replica=replica, models=models))
        with self._errors(), _cancelling(call):
            async for response in call:
                yield response

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as failed:
            error = error_from(failed)
            raise self._gone() if isinstance(error, LoaderGone) else error from failed

    def _gone(self) -> HeadwaterError:
        return LoaderGone(f"no loader answers on {self._name}")


@contextmanager
def _cancelling(call: grpc.aio.Call) -> Iterator[None]:
    try:
        yield
    finally:
        call.cancel()  # without effect on a call that has ended
