"""The models of one loader as this sampler has them: attached at start or on first use, let go when the loader says so.

An attached model whose params are all READY needs no loader any more. One that is still being filled waits for the
loader to come back; if it comes back with other arenas, waiting riders fail and the next request attaches anew.

The loader tells of models that were replaced or removed: requests under way end on what they began with, the next one
gets what is there now. It asks for models back whose room is needed: they are let go of as soon as nobody uses them,
and attached again when they are next asked for. Those that the operator named to be attached are kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress

import structlog

from services.errors import HeadwaterError, InvalidRequest, LoaderGone, ShuttingDown
from services.rpc.loader_client import (
    PRIORITY_HIGH,
    PRIORITY_LOW,
    LoaderClient,
    LoaderModel,
    PrepareNews,
    ResidencyNews,
)
from services.sampler.attaching import Attacher, on_baton
from services.sampler.engine import Engine
from services.sampler.gates import Gate
from services.sampler.model import AttachedModel

RETRY_S = 0.5

log = structlog.get_logger()


class Library:
    """Attached models by name. All methods belong to one event loop; what touches modules runs under the baton.

    replica: who this is to the loader; kept: names of models that are not given back while they are attached.
    """

    def __init__(
        self, loader: LoaderClient, engine: Engine, attacher: Attacher, replica: str, kept: Collection[str] = ()
    ) -> None:
        self.attached: dict[str, AttachedModel] = {}
        self.loader_connected = False
        self._loader = loader
        self._engine = engine
        self._attacher = attacher
        self._replica = replica
        self._kept = kept
        self._attaching: dict[str, asyncio.Task[AttachedModel]] = {}
        self._fills: dict[AttachedModel, asyncio.Task[None]] = {}
        self._uses: dict[AttachedModel, int] = {}
        self._asked: set[str] = set()  # the loader wants their room
        self._leaving: set[AttachedModel] = set()  # to be detached when nobody uses them
        self._tasks: set[asyncio.Task[None]] = set()
        self._fetching: dict[Gate, asyncio.Task[None]] = {}
        self._loop = asyncio.get_running_loop()
        engine.on_starved = self._starved

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
                    async for news in states:
                        if not self.loader_connected:
                            self.loader_connected = True
                            log.info("loader connected")
                            on_change(True)
                            self._forget_all_but({model.name for model in news.models})
                        self._heed(news)
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
        while self.attached.get(model.name) is not model:  # let go of before its caller's turn came
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
                self._spawn(self._detach(model))
            elif model.name in self._asked:
                self._give_back(model.name)

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
        async with self.using(name) as model, aclosing(self._loader.prepare(model.name, model.fill_order())) as fill:
            async for news in fill:
                yield news

    async def hint(self, name: str) -> AsyncGenerator[PrepareNews, None]:
        """Have the loader read a model behind everything else, without attaching it; its news until READY."""
        async with aclosing(self._loader.prepare(name, (), PRIORITY_LOW, self._replica)) as fill:
            async for news in fill:
                yield news

    async def close(self) -> None:
        """Detach everything. Riders must have ended."""
        for task in [*self._fills.values(), *self._attaching.values()]:
            task.cancel()
        await asyncio.gather(*self._fills.values(), *self._attaching.values(), *self._tasks, return_exceptions=True)
        for model in self.attached.values():
            await on_baton(self._engine, model.detach)
        self.attached.clear()

    async def _attach(self, name: str) -> AttachedModel:
        async with self._attacher.attached(name, list(self.attached.values())) as model:
            self.attached[name] = model
            self._asked.discard(name)
            self._fills[model] = asyncio.create_task(self._follow(model))
            self._fills[model].add_done_callback(lambda _: self._fills.pop(model, None))
        log.info("attached", model=name, size_bytes=model.size_bytes, gates=len(model.gates))
        return model

    async def _follow(self, model: AttachedModel) -> None:
        """Ask for the model's extents in the order of need and wake riders as they come, until all are READY."""
        while model.ready_bytes < model.size_bytes:
            try:
                async with aclosing(
                    self._loader.prepare(model.name, model.fill_order(), replica=self._replica)
                ) as fill:
                    async for news in fill:
                        if not is_mapped(model, news):
                            gone = LoaderGone("the loader was restarted and reads the model anew: ask again")
                            await self._abandon(model, gone)
                            return
                        await asyncio.to_thread(self._engine.wake)
            except LoaderGone as error:
                log.warning("waiting for the loader", model=model.name, reason=str(error))
                await asyncio.sleep(RETRY_S)
            except HeadwaterError as error:
                log.warning("the rest of the model cannot be had", model=model.name, reason=str(error))
                await self._abandon(model, error)
                return
        await asyncio.to_thread(self._engine.wake)
        log.info("all params ready", model=model.name, size_bytes=model.size_bytes)

    async def _abandon(self, model: AttachedModel, error: HeadwaterError) -> None:
        """Fail who waits for bytes that will not come, and let go of the model."""
        self._engine.fail(model.gates, error)
        self._fills.pop(model, None)  # that is where we are
        self._let_go(model)

    # ---- what the loader says

    def _heed(self, news: ResidencyNews) -> None:
        """Let go of models that were removed or replaced, and of those whose room is needed once nobody uses them."""
        for name in news.removed:
            if name in self.attached:
                self._let_go(self.attached[name])
        for theirs in news.models:
            if theirs.name in self.attached and is_replaced(self.attached[theirs.name], theirs):
                self._let_go(self.attached[theirs.name])
        for name in news.give_back:
            if name in self.attached and name not in self._kept:
                self._asked.add(name)
                self._give_back(name)

    def _forget_all_but(self, names: Collection[str]) -> None:
        for model in [model for name, model in self.attached.items() if name not in names]:
            self._let_go(model)

    def _give_back(self, name: str) -> None:
        if self.attached[name] not in self._uses:
            self._asked.discard(name)
            self._let_go(self.attached[name])

    def _let_go(self, model: AttachedModel) -> None:
        """New requests attach anew; those under way end on what they have, and then it is detached."""
        log.info("letting go", model=model.name, uses=self._uses.get(model, 0))
        if self.attached.get(model.name) is model:
            del self.attached[model.name]
        if model in self._uses:
            self._leaving.add(model)
        else:
            self._spawn(self._detach(model))

    async def _detach(self, model: AttachedModel) -> None:
        fetches = [task for gate, task in self._fetching.items() if gate in model.gates]
        for task in [*fetches, *filter(None, [self._fills.pop(model, None)])]:
            task.cancel()  # it would look at arenas that are closed
        await on_baton(self._engine, model.detach)

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # ---- what riders stand still for

    def _starved(self, gate: Gate) -> None:
        """A rider waits for a gate's bytes. Called in its thread, under the baton."""
        self._loop.call_soon_threadsafe(self._fetch_first, gate)

    def _fetch_first(self, gate: Gate) -> None:
        model = next((model for model in self.attached.values() if gate in model.gates), None)
        if model is not None and gate not in self._fetching:
            self._fetching[gate] = self._spawn(self._fetch(model, gate))
            self._fetching[gate].add_done_callback(lambda _: self._fetching.pop(gate))

    async def _fetch(self, model: AttachedModel, gate: Gate) -> None:
        """Have the loader read what a gate needs before what is only going to be needed."""
        order = [(gate.component, gate.extents)]
        try:
            async with aclosing(self._loader.prepare(model.name, order, PRIORITY_HIGH, self._replica)) as fill:
                async for _ in fill:
                    if all(map(gate.arena.is_ready, gate.extents)):
                        break
        except HeadwaterError as error:
            log.debug("a gate's bytes were not fetched", gate=str(gate), reason=str(error))  # `_follow` tells


def is_replaced(model: AttachedModel, theirs: LoaderModel) -> bool:
    """Whether the loader has other bytes under the model's name, or the same ones in another place."""
    parts = {part.name: part for part in theirs.components}
    if not parts:
        return False  # its files cannot be read now: what is attached is all there is
    if theirs.config not in ("", model.config.name) or any(c.name not in parts for c in model.components):
        return True
    pairs = [(c.arena, parts[c.name]) for c in model.components]
    return any(
        arena.identity != part.identity or part.generation not in ("", arena.generation) for arena, part in pairs
    )


def is_mapped(model: AttachedModel, news: PrepareNews) -> bool:
    """Whether the loader fills the very arenas that are mapped here."""
    if not news.HasField("model"):
        return True
    theirs = {c.name: c.generation for c in news.model.components}
    return all(theirs.get(c.name) == c.arena.generation for c in model.components)
