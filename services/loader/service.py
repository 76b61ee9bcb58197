"""LoaderService over gRPC: checks requests, asks the store, converts what it says."""

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

from google.protobuf import duration_pb2
from headwater.loader.v1 import loader_pb2 as pb
from headwater.loader.v1 import loader_pb2_grpc

from services.errors import InvalidRequest
from services.loader.models import Reloaded
from services.loader.records import ComponentView, ModelView, Progress
from services.loader.store import ParamStore
from services.loader.tickets import Priority

SERVICE = pb.DESCRIPTOR.services_by_name["LoaderService"].full_name
MAX_REPLICA_CHARACTERS = 128
MAX_SELECTIONS = 1_000


class LoaderService(loader_pb2_grpc.LoaderServiceServicer):
    """Adapter; raises types of services/errors.py, the interceptor turns them into statuses."""

    def __init__(self, store: ParamStore, reload: Callable[[], Awaitable[Reloaded]]) -> None:
        self._store = store
        self._reload = reload

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[_model(view) for view in self._store.models()])

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        _require(request.model)
        return pb.GetModelResponse(model=_model(self._store.model(request.model)))

    async def PrepareParams(
        self, request: pb.PrepareParamsRequest, context: Any
    ) -> AsyncIterator[pb.PrepareParamsResponse]:
        _require(request.model)
        if len(request.order) > MAX_SELECTIONS:
            raise InvalidRequest(("order", f"at most {MAX_SELECTIONS} selections"))
        order = [(selection.component, tuple(selection.extents)) for selection in request.order]
        priority, replica = _priority(request.priority), _replica(request.replica)
        async for progress in self._store.prepare(request.model, order, priority, replica):
            yield _progress(progress)

    async def EvictModel(self, request: pb.EvictModelRequest, context: Any) -> pb.EvictModelResponse:
        _require(request.model)
        return pb.EvictModelResponse(freed_bytes=await self._store.evict(request.model))

    async def WatchResidency(
        self, request: pb.WatchResidencyRequest, context: Any
    ) -> AsyncIterator[pb.WatchResidencyResponse]:
        async for news in self._store.watch(_replica(request.replica), list(request.models)):
            yield pb.WatchResidencyResponse(
                models=[_model(view) for view in news.models], removed=news.removed, give_back=news.give_back
            )

    async def ReloadModels(self, request: pb.ReloadModelsRequest, context: Any) -> pb.ReloadModelsResponse:
        reloaded = await self._reload()
        return pb.ReloadModelsResponse(added=reloaded.added, removed=reloaded.removed, changed=reloaded.changed)


def _require(model: str) -> None:
    if not model:
        raise InvalidRequest(("model", "name a model of models.toml"))


def _replica(name: str) -> str:
    if len(name) > MAX_REPLICA_CHARACTERS or not name.isprintable():
        raise InvalidRequest(("replica", f"at most {MAX_REPLICA_CHARACTERS} printable characters"))
    return name or "unnamed"


def _priority(number: int) -> Priority:
    if number not in pb.Priority.values():
        raise InvalidRequest(("priority", "one of the values of Priority"))
    return Priority(number) if number else Priority.NORMAL


def _model(view: ModelView) -> pb.Model:
    return pb.Model(
        name=view.name,
        pipeline_class=view.pipeline_class,
        state=pb.ResidencyState.ValueType(view.state.value),
        reason=view.reason,
        components=[_component(component) for component in view.components],
        config=view.config,
        read_bytes=view.read_bytes,
    )


def _component(view: ComponentView) -> pb.Component:
    return pb.Component(
        name=view.name,
        arena=view.arena,
        generation=view.generation,
        size_bytes=view.size_bytes,
        ready_bytes=view.ready_bytes,
        extent_count=view.extent_count,
        state=pb.ResidencyState.ValueType(view.state.value),
        identity=view.identity,
    )


def _progress(progress: Progress) -> pb.PrepareParamsResponse:
    response = pb.PrepareParamsResponse(
        model=_model(progress.model) if progress.model else None,
        total_bytes=progress.total_bytes,
        ready_bytes=progress.ready_bytes,
        rate_bytes_per_second=progress.rate_bytes_per_second,
        ready=[pb.ExtentSelection(component=name, extents=extents) for name, extents in progress.ready.items()],
        done=progress.is_done,
    )
    if progress.eta_s is not None:
        eta = duration_pb2.Duration()
        eta.FromTimedelta(timedelta(seconds=min(progress.eta_s, 1e9)))
        response.eta.CopyFrom(eta)
    return response
