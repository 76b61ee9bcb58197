"""The params this host holds: which models there are, what of them is in memory, who waits for what.

A component's life: ABSENT until somebody prepares a model that has it; then an arena is reserved, whole, while its
extents are filled in the order asked, once, for all callers together; READY until it is evicted. A fill that fails
leaves the component FAILED until the next prepare, which starts over. After a loader's death its arenas are adopted:
READY extents are verified against their digests, the others filled again.

All of it runs on the event loop; only admission's system calls and the fill itself leave it, for threads. No grpc.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence

import structlog

from services.errors import BadCheckpoint, HeadwaterError, Leased, ShuttingDown, UnknownModel
from services.loader.admission import Admission
from services.loader.arenas import ArenaDir
from services.loader.catalog import ModelSource, read_model
from services.loader.config import ModelEntry
from services.loader.fill import Filler
from services.loader.progress import Changes, follow
from services.loader.queue import FillQueue, Urgency
from services.loader.records import ModelRecord, ModelView, Part, Progress, Resident, view_of
from services.loader.tickets import Order, Ticket, check_order
from services.loader.workers import fill_forever

_WATCH_PAUSE_S = 0.05

_log = structlog.get_logger()


class ParamStore:
    """Models by name. `start` before anything else; `stop` gives all memory back."""

    def __init__(
        self,
        entries: Iterable[ModelEntry],
        directory: ArenaDir,
        filler: Filler,
        extent_bytes: int,
        budget_bytes: int | None = None,
    ) -> None:
        self._records = {entry.name: ModelRecord(entry) for entry in entries}
        self._directory = directory
        self._filler = filler
        self._extent_bytes = extent_bytes
        self._admission = Admission(directory, budget_bytes, self._label, self._is_pinned)
        self._admitting = asyncio.Lock()
        self._queue = FillQueue()
        self._changes = Changes()
        self._read_bytes: Counter[str] = Counter()
        self._replicas: Counter[str] = Counter()
        self._workers: list[asyncio.Task[None]] = []
        self._admissions: set[asyncio.Task[None]] = set()
        self._is_stopping = False

    async def start(self) -> None:
        """Read all models' headers, adopt what a dead loader left, and start to fill what is asked."""
        count = self._filler.thread_count
        await asyncio.gather(*(self._scan(record) for record in self._records.values()))
        sources = [source for record in self._records.values() for source in record.components]
        for resident in self._admission.adopt(sources):
            self._queue.put(resident, range(len(resident.states)), Urgency.ADOPTED)
            _log.info("adopted", component=self._label(resident), generation=resident.arena.header.generation)
        for record in self._records.values():
            if record.source and len(self._parts(record)) == len(record.components):
                await self._resume(record, record.source)
        self._directory.remove_configs_except({record.config for record in self._records.values()})
        workers = (fill_forever(self._queue, self._filler, self._changes, self._read_bytes) for _ in range(count))
        self._workers = [asyncio.create_task(worker) for worker in workers]

    async def _resume(self, record: ModelRecord, source: ModelSource) -> None:
        """Go on with a model that a dead loader had; without its config folder it waits to be prepared again."""
        try:
            record.config = await asyncio.to_thread(self._directory.publish_config, record.entry.name, source)
            record.is_wanted = True
        except HeadwaterError as error:
            _log.warning("no config folder", model=record.entry.name, reason=str(error))

    async def load_all(self) -> None:
        """Prepare every model, in order, behind whatever callers ask for; evicts nothing."""
        for record in self._records.values():
            nobody = Ticket()
            nobody.release()
            try:
                await self._admitted(record, (), nobody, Urgency.EAGER)
            except ShuttingDown:
                return
            except HeadwaterError as error:
                _log.warning("not loaded eagerly", model=record.entry.name, reason=str(error))

    def models(self) -> list[ModelView]:
        return [self._view(record) for record in self._records.values()]

    def model(self, name: str) -> ModelView:
        """Raises UnknownModel."""
        return self._view(self._record(name))

    async def prepare(self, name: str, order: Order = ()) -> AsyncIterator[Progress]:
        """Make a model resident; news until all of it is READY. Leaving early does not stop the fill.

        Raises UnknownModel, BadCheckpoint, HostMemoryFull, CheckpointChanged, ShuttingDown.
        """
        record, ticket = self._record(name), Ticket()
        try:
            await self._admitted(record, order, ticket, Urgency.PREPARED)
            news = follow(ticket.parts, lambda: self._view(record), self._changes)
            async for progress in news:
                yield progress
        finally:
            ticket.release()

    async def evict(self, name: str) -> int:
        """Give a model's memory back; the bytes freed. Raises UnknownModel, Leased."""
        record = self._record(name)
        async with self._admitting:
            freed = await self._admission.drop(self._unshared(record))
            if freed is None:
                who = f"; watching are: {', '.join(sorted(self._replicas))}" if self._replicas else ""
                raise Leased(f"{name} is in use by a sampler or being filled; nothing was evicted{who}")
            record.is_wanted = False
            self._tidy()
        return freed

    async def give_back(self) -> int | None:
        """Evict the component that was used least recently, if one may go; its bytes. The host is short of memory."""
        async with self._admitting:
            freed = await self._admission.drop_idle()
            self._tidy()
        return freed

    async def watch(self, replica: str, names: Sequence[str] = ()) -> AsyncIterator[list[ModelView]]:
        """All models named (none: all), then those that changed, until the store stops. Raises UnknownModel."""
        records = [self._record(name) for name in names] or list(self._records.values())
        known: dict[str, ModelView] = {}
        self._replicas[replica] += 1
        try:
            while not self._is_stopping:
                version = self._changes.version
                views = {record.entry.name: self._view(record) for record in records}
                if news := [view for name, view in views.items() if known.get(name) != view]:
                    yield news
                known = views
                await self._changes.after(version)
                await asyncio.sleep(_WATCH_PAUSE_S)
        finally:
            self._replicas -= Counter([replica])
        raise ShuttingDown("the loader stops")

    def begin_stop(self) -> None:
        """End all streams and let no new fill begin."""
        self._is_stopping = True
        self._filler.stop()
        self._changes.close()

    async def stop(self) -> None:
        """Give all memory back. A sampler that maps an arena keeps it until it unmaps."""
        self.begin_stop()
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, *self._admissions, return_exceptions=True)
        self._filler.close()
        residents = list(self._admission.residents.values())
        for resident in residents:
            resident.busy.clear()  # its threads are joined
        await self._admission.drop(residents, even_if_leased=True)

    async def _admitted(self, record: ModelRecord, order: Order, ticket: Ticket, urgency: Urgency) -> None:
        """Admit in a task of its own: the caller may leave, a reservation is never left half done."""
        task = asyncio.create_task(self._admit(record, order, ticket, urgency))
        self._admissions.add(task)
        task.add_done_callback(self._admissions.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(task)

    async def _admit(self, record: ModelRecord, order: Order, ticket: Ticket, urgency: Urgency) -> None:
        async with self._admitting:
            if self._is_stopping:
                raise ShuttingDown("the loader stops")
            if not self._is_whole(record):
                await self._scan_again(record)
            check_order(record, order)
            new: list[Resident] = []
            if not self._is_whole(record):
                new = await self._begin(record, may_evict=urgency is not Urgency.EAGER)
            ticket.hold(self._parts(record))
            record.is_wanted = True
            parts = dict(self._parts(record))
            for component, extents in order:
                self._queue.put(parts[component], extents or range(len(parts[component].states)), Urgency.NAMED)
            for resident in parts.values():
                self._queue.put(resident, range(len(resident.states)), urgency)
            await self._reserve(new)
        self._changes.notify()

    def _is_whole(self, record: ModelRecord) -> bool:
        residents = self._admission.of(record.components)
        is_here = bool(record.config) and len(residents) == len(record.components)
        return is_here and not any(resident.error for resident in residents)

    async def _scan_again(self, record: ModelRecord) -> None:
        """The files may have been replaced or mended since they were last looked at."""
        failed = [resident for resident in self._admission.of(record.components) if resident.error]
        for resident in failed:
            await self._discard(resident)
        await self._scan(record)
        known = {part.identity for other in self._records.values() for part in other.components}
        for identity, resident in list(self._admission.residents.items()):
            if identity not in known:
                await self._admission.drop([resident])  # of files that are no more; spared while in use
        self._tidy()
        if record.source is None:
            raise BadCheckpoint(record.reason)

    async def _begin(self, record: ModelRecord, may_evict: bool) -> list[Resident]:
        assert record.source
        new = await self._admission.begin(record.components, may_evict)
        try:
            publish = self._directory.publish_config
            record.config = await asyncio.to_thread(publish, record.entry.name, record.source)
        except HeadwaterError:
            await self._admission.drop(new, even_if_leased=True)
            raise
        finally:
            self._tidy()
        return new

    async def _reserve(self, new: Sequence[Resident]) -> None:
        """Reserve memory while the disk is read already. If there is too little, nothing of `new` stays."""
        try:
            await self._admission.reserve(new)
        except Exception as error:
            for resident in new:
                resident.error = error  # nobody begins with another extent of it
            if not self._is_stopping:  # else threads may still be at work, and `stop` drops all
                for resident in new:
                    await self._discard(resident)
                self._tidy()
            raise

    async def _scan(self, record: ModelRecord) -> None:
        try:
            record.source = await asyncio.to_thread(read_model, record.entry, self._extent_bytes)
            record.reason = ""
        except BadCheckpoint as error:
            record.source, record.reason = None, str(error)
            _log.warning("a model cannot be served", model=record.entry.name, reason=record.reason)

    async def _discard(self, resident: Resident) -> None:
        """Forget a failed component: what samplers map of it stays theirs."""
        while resident.busy:
            await self._changes.after(self._changes.version)
        await self._admission.drop([resident], even_if_leased=True)

    def _record(self, name: str) -> ModelRecord:
        if name not in self._records:
            known = ", ".join(sorted(self._records)[:20])
            raise UnknownModel(f"no model {name[:64]!r}; known: {known}" if name else "no model named")
        return self._records[name]

    def _parts(self, record: ModelRecord) -> list[Part]:
        """The model's components that are in memory, by name."""
        here = self._admission.residents
        return [(part.name, here[part.identity]) for part in record.components if part.identity in here]

    def _unshared(self, record: ModelRecord) -> list[Resident]:
        others = (other for other in self._records.values() if other is not record and other.is_wanted)
        shared = {part.identity for other in others for part in other.components}
        return [
            resident for resident in self._admission.of(record.components) if resident.source.identity not in shared
        ]

    def _tidy(self) -> None:
        """Drop config folders of models with nothing in memory, and tell who watches."""
        for record in self._records.values():
            if record.config and not self._parts(record):
                self._directory.remove_config(record.config)
                record.config, record.is_wanted = "", False
        self._changes.notify()

    def _view(self, record: ModelRecord) -> ModelView:
        return view_of(record, dict(self._parts(record)), self._read_bytes)

    def _is_pinned(self, resident: Resident) -> bool:
        pinned = (record for record in self._records.values() if record.entry.pin)
        return any(part.identity == resident.source.identity for record in pinned for part in record.components)

    def _label(self, resident: Resident) -> str:
        for record in self._records.values():
            for part in record.components:
                if part.identity == resident.source.identity:
                    return f"{record.entry.name}/{part.name}"
        return f"replaced/{resident.source.name}"
