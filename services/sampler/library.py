"""The models of one loader as this sampler has them: attached at start or on first use, let go at stop.

An attached model whose params are all READY needs no loader any more. One that is still being filled waits for the
loader to come back; if it comes back with other arenas, waiting riders fail and the next request attaches anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

import structlog

from services.errors import HeadwaterError, InvalidRequest, LoaderGone, ShuttingDown
from services.params.arena import AttachedArena, attach
from services.rpc.loader_client import LoaderClient, LoaderModel, PrepareNews
from services.sampler.binding import BoundComponent, build_pipeline
from services.sampler.blocks import Speedup
from services.sampler.engine import Engine
from services.sampler.model import AttachedModel
from services.sampler.riders import Rider
from services.sampler.traits import Traits, traits_of
from services.sampler.work import Kind
from services.sampler.workspace import Workspace

RETRY_S = 0.5

log = structlog.get_logger()
T = TypeVar("T")


class Library:
    """Attached models by name. All methods belong to one event loop; what touches modules runs under the baton."""

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
        self.attached: dict[str, AttachedModel] = {}
        self.loader_connected = False
        self._loader = loader
        self._engine = engine
        self._workspace = workspace
        self._arena_dir = arena_dir
        self._gate_limit_bytes = gate_limit_bytes
        self._replica = replica
        self._speedups = speedups
        self._attaching: dict[str, asyncio.Task[AttachedModel]] = {}
        self._fills: dict[str, asyncio.Task[None]] = {}
        self._uses: dict[AttachedModel, int] = {}
        self._leaving: set[AttachedModel] = set()  # to be detached when nobody uses them
        self._detaching: set[asyncio.Task[None]] = set()

    # ---- what there is

    async def models(self) -> list[LoaderModel]:
        """Every model that the loader knows. Raises LoaderGone."""
        return await self._loader.list_models()

    async def resolve(self, name: str) -> str:
        """`name`, or the only model's if it is empty. Raises InvalidRequest, LoaderGone."""
        if name:
            return name
        try:
            names = sorted(model.name for model in await self.models())
        except LoaderGone:
            names = sorted(self.attached)
            if not names:
                raise
        if len(names) != 1:
            raise InvalidRequest(("model", f"name one of {', '.join(names)}"))
        return names[0]

    async def watch(self, on_change: Callable[[bool], object]) -> None:
        """Say to the loader who is here, for ever, and to `on_change` whether it answers."""
        while True:
            with suppress(HeadwaterError):
                async with aclosing(self._loader.watch(self._replica)) as states:
                    async for _ in states:
                        if not self.loader_connected:
                            self.loader_connected = True
                            log.info("loader connected")
                            on_change(True)
            if self.loader_connected:
                self.loader_connected = False
                log.warning("loader gone; attached models are served on", models=sorted(self.attached))
                on_change(False)
            await asyncio.sleep(RETRY_S)

    # ---- models come and go

    @asynccontextmanager
    async def using(self, name: str) -> AsyncGenerator[AttachedModel, None]:
        """The model, attached, and kept so for the time of the block. Raises what the loader answers."""
        model = await self.attach(name)
        self.keep(model)
        try:
            yield model
        finally:
            self.release(model)

    def keep(self, model: AttachedModel) -> None:
        self._uses[model] = self._uses.get(model, 0) + 1

    def release(self, model: AttachedModel) -> None:
        self._uses[model] -= 1
        if not self._uses[model]:
            del self._uses[model]
            if model in self._leaving:
                self._leaving.discard(model)
                self._detaching.add(asyncio.create_task(self.on_baton(model.detach)))

    async def attach(self, name: str) -> AttachedModel:
        """The model, attached if it was not; many callers share one attaching."""
        name = await self.resolve(name)
        if name in self.attached:
            return self.attached[name]
        if name not in self._attaching:
            task = asyncio.create_task(self._attach(name))
            self._attaching[name] = task
            task.add_done_callback(lambda _: self._attaching.pop(name))
        return await asyncio.shield(self._attaching[name])

    async def attach_patiently(self, name: str) -> AttachedModel:
        """As `attach`, but waits for a loader that does not answer."""
        told = False
        while True:
            try:
                return await self.attach(name)
            except (LoaderGone, ShuttingDown) as error:
                if not told:
                    log.warning("waiting for the loader", model=name, reason=str(error))
                    told = True
            await asyncio.sleep(RETRY_S)

    async def prepare(self, name: str) -> AsyncGenerator[PrepareNews, None]:
        """Attach, then the loader's news until all params are READY."""
        model = await self.attach(name)
        async with aclosing(self._loader.prepare(model.name, model.fill_order())) as fill:
            async for news in fill:
                yield news

    async def close(self) -> None:
        """Detach everything. Riders must have ended."""
        for task in [*self._fills.values(), *self._attaching.values()]:
            task.cancel()
        await asyncio.gather(*self._fills.values(), *self._attaching.values(), *self._detaching, return_exceptions=True)
        for model in self.attached.values():
            await self.on_baton(model.detach)
        self.attached.clear()

    async def _attach(self, name: str) -> AttachedModel:
        reserved = await self._reserved(name)
        arenas: dict[str, AttachedArena] = {}
        try:
            for component in reserved.components:
                arenas[component.name] = attach(self._arena_dir / component.arena, component.generation)
            model = await self._build(name, self._arena_dir / reserved.config, arenas)
        except BaseException:
            for arena in arenas.values():
                arena.close()
            raise
        self.attached[name] = model
        self._fills[name] = asyncio.create_task(self._follow(model))
        log.info("attached", model=name, size_bytes=model.size_bytes, gates=len(model.gates))
        return model

    async def _reserved(self, name: str) -> LoaderModel:
        """The model with its arenas, as soon as the loader has reserved their memory."""
        async with aclosing(self._loader.prepare(name)) as fill:
            async for news in fill:
                return news.model
        raise LoaderGone("the loader ended the call without a word")

    async def _build(self, name: str, config: Path, arenas: dict[str, AttachedArena]) -> AttachedModel:
        def pipeline() -> tuple[object, list[BoundComponent]]:
            return build_pipeline(config, arenas)

        built, components = await self.on_baton(pipeline)
        if any(c.outside for c in components) and not all(a.ready_bytes == a.size_bytes for a in arenas.values()):
            # A library converted tensors that may not have been read yet.
            async for _ in self._loader.prepare(name):
                pass
            built, components = await self.on_baton(pipeline)
        traits = traits_of(built, config)
        pictures = [default_kind(m.name, m.traits) for m in self.attached.values()]
        pictures.append(default_kind(name, traits))

        def attached() -> AttachedModel:
            work = self._workspace.least_bytes(pictures)
            return AttachedModel(
                name, built, components, self._engine, traits, self._gate_limit_bytes, self._speedups, config, work
            )

        return await self.on_baton(attached)

    async def _follow(self, model: AttachedModel) -> None:
        """Ask for the model's extents in the order of need and wake riders as they come, until all are READY."""
        while model.ready_bytes < model.size_bytes:
            try:
                async with aclosing(self._loader.prepare(model.name, model.fill_order())) as fill:
                    async for news in fill:
                        if not is_mapped(model, news):
                            gone = LoaderGone("the loader was restarted and reads the model anew: ask again")
                            await self._abandon(model, gone)
                            return
                        await asyncio.to_thread(self._engine.wake)
            except LoaderGone as error:
                if model.name not in self.attached:
                    return
                log.warning("waiting for the loader", model=model.name, reason=str(error))
                await asyncio.sleep(RETRY_S)
            except HeadwaterError as error:
                log.warning("the rest of the model cannot be had", model=model.name, reason=str(error))
                await self._abandon(model, error)
                return
        await asyncio.to_thread(self._engine.wake)
        log.info("all params ready", model=model.name, size_bytes=model.size_bytes)

    async def _abandon(self, model: AttachedModel, error: HeadwaterError) -> None:
        """Fail who waits for bytes that will not come, and let the model go when nobody uses it."""
        self.attached.pop(model.name, None)
        self._engine.fail(model.gates, error)
        if model in self._uses:
            self._leaving.add(model)
        else:
            await self.on_baton(model.detach)

    async def on_baton(self, work: Callable[[], T]) -> T:
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

        self._engine.ride(Rider(lambda rider: work(), settle_soon))
        return await done


def default_kind(name: str, traits: Traits) -> Kind:
    return Kind(name, traits.width_px, traits.height_px)


def is_mapped(model: AttachedModel, news: PrepareNews) -> bool:
    """Whether the loader fills the very arenas that are mapped here."""
    if not news.HasField("model"):
        return True
    theirs = {c.name: c.generation for c in news.model.components}
    return all(theirs.get(c.name) == c.arena.generation for c in model.components)
