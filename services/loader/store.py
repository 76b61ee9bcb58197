"""The params this host holds, and those who want them: callers of prepare, watchers, the eager load.

A component's life: ABSENT until somebody prepares a model that has it; then an arena is reserved, whole, while its
extents are filled in the order asked, once, for all callers together; READY until it is evicted. A fill that nobody
wants any more rests where it is. One that fails leaves the component FAILED until the next prepare, which starts over.
After a loader's death its arenas are adopted: READY extents are verified against their digests, others filled again.

All of it runs on the event loop; only admission's system calls and the fill itself leave it, for threads. No grpc.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from time import monotonic

import structlog

from services.errors import HeadwaterError, HostMemoryFull, ShuttingDown
from services.loader.arenas import ArenaDir
from services.loader.entries import ModelEntry
from services.loader.fill import Filler
from services.loader.holdings import Holdings
from services.loader.models import Models, Reloaded, has_changed
from services.loader.progress import Changes, follow
from services.loader.queue import FillQueue
from services.loader.reaper import PERIOD_S
from services.loader.records import ModelRecord, ModelView, Progress, Resident
from services.loader.telling import Filling
from services.loader.tickets import Order, Priority, Ticket, Urgency, check_order
from services.loader.watchers import News, Watchers
from services.loader.workers import fill_forever

_WATCH_PAUSE_S = 0.05
_GIVE_BACK_S = 3.0  # that samplers get to let go, all of them together
_POLL_S = 0.02

_log = structlog.get_logger()


class ParamStore:
    """Models by name. `scan`, `adopt`, then `begin`, before anything else; `stop` gives all memory back."""

    def __init__(
        self,
        entries: Iterable[ModelEntry],
        directory: ArenaDir,
        filler: Filler,
        extent_bytes: int,
        budget_bytes: int | None = None,
    ) -> None:
        self._models = Models(entries, extent_bytes)
        self._filler = filler
        self._queue = FillQueue(filler.fill_limit)
        self._changes = Changes()
        self._watchers = Watchers()
        self._holdings = Holdings(self._models, directory, budget_bytes, self._changes, lambda: self._watchers.names)
        self._tasks: list[asyncio.Task[None]] = []
        self._admissions: set[asyncio.Task[None]] = set()
        self._is_stopping = False

    async def scan(self) -> dict[str, int]:
        """Read all models' headers; bytes of arenas that each takes, by name, but for those that cannot be served."""
        await self._models.read_all()
        return self._holdings.sizes()

    async def adopt(self) -> None:
        """Take over what a dead loader left; it is verified once work begins."""
        nobody = Ticket(Priority.EAGER)
        for resident in await self._holdings.adopt():
            self._queue.put(resident, range(len(resident.states)), Urgency.ADOPTED, nobody)

    def begin(self) -> None:
        """Start to fill and to verify. Calls may come before."""
        workers = (
            fill_forever(self._queue, self._filler, self._changes, self._holdings.read_bytes)
            for _ in range(self._filler.thread_count)
        )
        self._tasks = [asyncio.create_task(task) for task in (*workers, self._reap_forever())]

    async def load_all(self) -> None:
        """Prepare every model, in order, behind whatever callers ask for; evicts nothing."""
        for record in self._models:
            try:
                await self._admitted(record, (), Ticket(Priority.EAGER))
            except ShuttingDown:
                return
            except HeadwaterError as error:
                _log.warning("not loaded eagerly", model=record.entry.name, reason=str(error))

    async def reload(self, entries: Iterable[ModelEntry]) -> Reloaded:
        """Take over another models.toml, or the same with other files, without disturbing what is in use."""
        async with self._holdings.lock:
            reloaded = await self._holdings.reload(entries)
        _log.info("reloaded", added=reloaded.added, removed=reloaded.removed, changed=reloaded.changed)
        return reloaded

    def models(self) -> list[ModelView]:
        return [self._holdings.view(record) for record in self._models]

    def filling(self) -> Filling:
        """What is being read or verified now."""
        return self._holdings.filling()

    def model(self, name: str) -> ModelView:
        """Raises UnknownModel."""
        return self._holdings.view(self._models[name])

    async def prepare(
        self, name: str, order: Order = (), priority: Priority = Priority.NORMAL, replica: str = "unnamed"
    ) -> AsyncIterator[Progress]:
        """Make a model resident; news until all of it is READY. Who leaves early wants no more of it.

        Raises UnknownModel, BadCheckpoint, HostMemoryFull, CheckpointChanged, ShuttingDown.
        """
        record, ticket = self._models[name], Ticket(priority, replica)
        try:
            await self._admitted(record, order, ticket)
            news = follow(ticket.parts, lambda: self._holdings.view(record), self._changes)
            async for progress in news:
                yield progress
        finally:
            ticket.release()

    async def evict(self, name: str) -> int:
        """Give a model's memory back; the bytes freed. Raises UnknownModel, Leased."""
        record = self._models[name]
        async with self._holdings.lock:
            return await self._holdings.evict(record)

    async def give_back(self) -> int | None:
        """Evict the component that was used least recently, if one may go; its bytes. The host is short of memory.

        If none may go, samplers are asked to let go of one, for the next time.
        """
        async with self._holdings.lock:
            freed = await self._holdings.evict_idle()
        if not freed and (leased := self._holdings.admission.lease_for((), ())):
            self._ask_back(leased)
        return freed

    async def watch(self, replica: str, names: Sequence[str] = ()) -> AsyncIterator[News]:
        """All models named (none: all), then what changes, until the store stops. Raises UnknownModel."""
        for name in names:
            _ = self._models[name]
        with self._watchers.joined(replica) as watcher:
            while not self._is_stopping:
                version = self._changes.version
                views = {view.name: view for view in self.models() if not names or view.name in names}
                if news := watcher.news(views):
                    yield news
                await self._changes.after(version)
                await asyncio.sleep(_WATCH_PAUSE_S)
        raise ShuttingDown("the loader stops")

    def begin_stop(self) -> None:
        """End all streams and let no new fill begin."""
        self._is_stopping = True
        self._filler.stop()
        self._changes.close()

    async def stop(self) -> None:
        """Give all memory back. A sampler that maps an arena keeps it until it unmaps."""
        self.begin_stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._admissions, return_exceptions=True)
        self._filler.close()
        await self._holdings.evict_all()

    async def _admitted(self, record: ModelRecord, order: Order, ticket: Ticket) -> None:
        """Admit in a task of its own: the caller may leave, a reservation is never left half done."""
        task = asyncio.create_task(self._admit(record, order, ticket))
        self._admissions.add(task)
        task.add_done_callback(self._admissions.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(task)

    async def _admit(self, record: ModelRecord, order: Order, ticket: Ticket) -> None:
        """Admit; samplers are asked for room, for one component after the other, while that may help."""
        holdings, asked, deadline = self._holdings, list[Resident](), monotonic() + _GIVE_BACK_S
        is_changed = await has_changed(record)
        while True:
            async with holdings.lock:
                try:
                    return await self._admit_now(record, order, ticket, is_changed)
                except HostMemoryFull:
                    leased = holdings.admission.lease_for(record.components, asked) if ticket.may_ask else None
                    if leased is None or monotonic() > deadline:
                        raise
            is_changed = False
            asked.append(leased)
            self._ask_back(leased)
            await _given_back(leased, deadline)

    async def _admit_now(self, record: ModelRecord, order: Order, ticket: Ticket, is_changed: bool) -> None:
        if self._is_stopping:
            raise ShuttingDown("the loader stops")
        if is_changed or not self._holdings.is_whole(record):
            await self._holdings.read_again(record)
        check_order(record, order)
        is_whole = self._holdings.is_whole(record)
        new = [] if is_whole else await self._holdings.begin(record, ticket.priority.may_evict)
        parts = self._holdings.parts(record)
        ticket.hold(parts)
        record.is_wanted = True
        self._queue.put_all(parts, order, ticket)
        if not is_whole:
            await self._holdings.complete(record, new)
        self._changes.notify()

    def _ask_back(self, leased: Resident) -> None:
        """Have samplers hear that the room of this component is needed."""
        models = [record.entry.name for record in self._models.having(leased)]
        _log.info("asking samplers to let go", models=models)
        self._watchers.ask_back(models)
        self._changes.notify()

    async def _reap_forever(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            async with self._holdings.lock:
                await self._holdings.reap()


async def _given_back(leased: Resident, deadline: float) -> None:
    # Nothing tells when a lock of the kernel is free.
    while not leased.is_gone and leased.arena.is_leased() and monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(_POLL_S)
