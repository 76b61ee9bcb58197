"""How a model becomes attached: memory reserved by the loader, arenas mapped, a pipeline built on them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

from services.errors import LoaderGone
from services.params.arena import AttachedArena, attach
from services.rpc.loader_client import LoaderClient, LoaderModel
from services.sampler.binding import BoundComponent, build_pipeline
from services.sampler.blocks import Speedup
from services.sampler.engine import Engine
from services.sampler.model import AttachedModel
from services.sampler.riders import Rider
from services.sampler.tasks import abilities_of
from services.sampler.traits import Traits
from services.sampler.work import Kind
from services.sampler.workspace import Workspace

ATTEMPTS = 3  # room is short where a model goes before it is mapped

T = TypeVar("T")


class Attacher:
    """Attaches models of one loader to one engine. replica: who asks; arena_dir: the loader's folder."""

    def __init__(
        self,
        loader: LoaderClient,
        engine: Engine,
        workspace: Workspace,
        arena_dir: Path,
        gate_limit_bytes: int,
        replica: str,
        speedups: Sequence[Speedup] = (),
    ) -> None:
        self._loader = loader
        self._engine = engine
        self._workspace = workspace
        self._arena_dir = arena_dir
        self._gate_limit_bytes = gate_limit_bytes
        self._replica = replica
        self._speedups = speedups

    @asynccontextmanager
    async def attached(self, name: str, others: Iterable[AttachedModel]) -> AsyncGenerator[AttachedModel, None]:
        """The model, attached beside `others`; for the time of the block the loader goes on reading it.

        Raises what the loader answers, and what building a pipeline raises.
        """
        for attempt in range(ATTEMPTS):
            async with aclosing(self._loader.prepare(name, replica=self._replica)) as fill:
                first = await anext(fill, None)
                if first is None:
                    raise LoaderGone("the loader ended the call without a word")
                try:
                    arenas = self._lease(first.model)
                except LoaderGone:  # evicted between the answer and the lease
                    if attempt + 1 == ATTEMPTS:
                        raise
                    continue
                yield await self._build_or_let_go(first.model, arenas, others)
                return

    def _lease(self, reserved: LoaderModel) -> dict[str, AttachedArena]:
        """All of a model's arenas, mapped, or none."""
        arenas: dict[str, AttachedArena] = {}
        with _closing_on_error(arenas):
            for component in reserved.components:
                arenas[component.name] = attach(self._arena_dir / component.arena, component.generation)
        return arenas

    async def _build_or_let_go(
        self, reserved: LoaderModel, arenas: dict[str, AttachedArena], others: Iterable[AttachedModel]
    ) -> AttachedModel:
        with _closing_on_error(arenas):
            return await self._build(reserved.name, self._arena_dir / reserved.config, arenas, others)

    async def _build(
        self, name: str, config: Path, arenas: dict[str, AttachedArena], others: Iterable[AttachedModel]
    ) -> AttachedModel:
        def pipeline() -> tuple[object, list[BoundComponent]]:
            return build_pipeline(config, arenas)

        built, components = await on_baton(self._engine, pipeline)
        if any(c.outside for c in components) and not all(a.ready_bytes == a.size_bytes for a in arenas.values()):
            # A library converted tensors that may not have been read yet.
            async for _ in self._loader.prepare(name, replica=self._replica):
                pass
            built, components = await on_baton(self._engine, pipeline)
        abilities = await on_baton(self._engine, lambda: abilities_of(built, config))
        own = abilities.traits[abilities.own]
        pictures = [*(default_kind(m.name, m.traits) for m in others), default_kind(name, own)]

        def attached() -> AttachedModel:
            work = self._workspace.least_bytes(pictures)
            return AttachedModel(
                name, abilities, components, self._engine, self._gate_limit_bytes, self._speedups, config, work
            )

        return await on_baton(self._engine, attached)


@contextmanager
def _closing_on_error(arenas: dict[str, AttachedArena]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for arena in arenas.values():
            arena.close()
        raise


def default_kind(name: str, traits: Traits) -> Kind:
    return Kind(name, traits.width_px, traits.height_px, task=traits.task)


async def on_baton(engine: Engine, work: Callable[[], T]) -> T:
    """Run `work` under the engine's baton, in a thread of its own, between other riders' gates."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(rider: Rider) -> None:
        if done.cancelled():
            return
        if rider.error is not None:
            done.set_exception(rider.error)
        else:
            done.set_result(rider.result)  # type: ignore[arg-type] # `work`'s own type

    def settle_soon(rider: Rider) -> None:
        loop.call_soon_threadsafe(settle, rider)

    engine.ride(Rider(lambda rider: work(), settle_soon))
    return await done
