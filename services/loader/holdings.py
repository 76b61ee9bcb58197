"""What of the models is in memory, and everything that changes it: begun, replaced, evicted, left behind.

Its coroutines run one at a time, under `lock`; the caller holds it.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import structlog

from services.errors import BadCheckpoint, HeadwaterError, Leased
from services.loader.admission import Admission
from services.loader.arenas import ArenaDir
from services.loader.catalog import ModelSource
from services.loader.entries import ModelEntry
from services.loader.models import Models, Reloaded
from services.loader.progress import Changes
from services.loader.reaper import Reaper
from services.loader.records import ModelRecord, ModelView, Part, Resident, view_of
from services.loader.telling import Filling

_log = structlog.get_logger()


class Holdings:
    """Models and their residents. watching: names of the replicas that are here now."""

    def __init__(
        self,
        models: Models,
        directory: ArenaDir,
        budget_bytes: int | None,
        changes: Changes,
        watching: Callable[[], set[str]],
    ) -> None:
        self.models = models
        self.lock = asyncio.Lock()
        self.admission = Admission(directory, budget_bytes, models.is_pinned, self.describe)
        self.read_bytes: Counter[str] = Counter()  # by identity
        self._directory = directory
        self._reaper = Reaper(self.admission, directory, models)
        self._changes = changes
        self._watching = watching

    # ---- what there is

    def parts(self, record: ModelRecord) -> list[Part]:
        """The model's components that are in memory, by name."""
        here = self.admission.residents
        return [(part.name, here[part.identity]) for part in record.components if part.identity in here]

    def sizes(self) -> dict[str, int]:
        """Bytes of arenas that each model takes, by name; of those whose headers could be read."""
        known = (record for record in self.models if record.source)
        return {record.entry.name: self._directory.arena_bytes(record.components) for record in known}

    def view(self, record: ModelRecord) -> ModelView:
        return view_of(record, dict(self.parts(record)), self.read_bytes)

    def describe(self, resident: Resident) -> str:
        """A component for people: what it is called, and why it stays."""
        label = self.models.label(resident)
        if resident.user_count or resident.busy:
            return f"{label} being filled"
        if resident.arena.is_leased():
            who = ", ".join(sorted(resident.askers & self._watching()))
            return f"{label} in use by {who or 'a sampler'}"
        return f"{label} pinned" if self.models.is_pinned(resident) else label

    def is_whole(self, record: ModelRecord) -> bool:
        """Whether a sampler could be told of all of it: memory is there, and what it needs beside."""
        residents = self.admission.of(record.components)
        is_here = bool(record.config) and len(residents) == len(record.components)
        return is_here and not any(resident.error for resident in residents)

    def filling(self) -> Filling:
        """The models that are being read or verified now."""
        at_work = [resident for resident in self.admission.residents.values() if resident.busy]
        records = {record for resident in at_work for record in self.models.having(resident) if record.is_wanted}
        parts = {resident for record in records for _, resident in self.parts(record)}
        return Filling(
            tuple(sorted(record.entry.name for record in records)),
            sum(resident.ready_bytes for resident in parts),
            sum(resident.arena.header.layout.data_bytes for resident in parts),
        )

    # ---- models come in

    async def adopt(self) -> list[Resident]:
        """Take over what a dead loader left."""
        residents = self.admission.adopt(source for record in self.models for source in record.components)
        for resident in residents:
            _log.info("adopted", component=self.models.label(resident), generation=resident.arena.header.generation)
        await self._resume()
        self._directory.remove_configs_except({record.config for record in self.models})
        return residents

    async def begin(self, record: ModelRecord, may_evict: bool) -> list[Resident]:
        """Arenas for what is missing of a model, to be filled from now on; `complete` has to follow."""
        try:
            return await self.admission.begin(record.components, may_evict)
        finally:
            self._tidy()

    async def complete(self, record: ModelRecord, new: Sequence[Resident]) -> None:
        """What samplers need beside data, while the disk is read already: all memory, and the config folder.

        If either cannot be had, nothing of `new` stays.
        """
        assert record.source
        both = self.admission.reserve(new), self._publish(record, record.source)
        reserved, published = await asyncio.gather(*both, return_exceptions=True)
        if isinstance(published, str):
            record.config = published
        if error := next((each for each in (reserved, published) if isinstance(each, Exception)), None):
            await self._undo(new, error)
            raise error

    async def _undo(self, new: Sequence[Resident], error: Exception) -> None:
        for resident in new:
            resident.error = error  # nobody begins with another extent of it
        if not self._changes.is_closed:  # else threads may still be at work, and all is dropped at the end
            for resident in new:
                await self._discard(resident)
            self._tidy()

    async def read_again(self, record: ModelRecord) -> None:
        """The files may have been replaced or mended since they were last looked at. Raises BadCheckpoint."""
        for resident in self.admission.of(record.components):
            if resident.error:
                await self._discard(resident)
        source, parts = record.source, self.parts(record)
        await self.models.read(record)
        if record.source is None:
            raise BadCheckpoint(record.reason)
        if record.source != source:
            self._reaper.leave_config(record.config, parts)
            record.config = ""
        await self.reap()

    async def reload(self, entries: Iterable[ModelEntry]) -> Reloaded:
        """Take over another models.toml, or the same with other files; what is in use of the old stays so long."""
        before = [(record, self.parts(record)) for record in self.models]
        reloaded = await self.models.replace(entries)
        now = set(self.models)
        for record, parts in before:
            if record not in now:
                self._reaper.leave_config(record.config, parts)
        await self._resume()
        await self.reap()
        self._changes.notify()
        return reloaded

    # ---- memory goes back

    async def evict(self, record: ModelRecord) -> int:
        """The bytes given back. Raises Leased."""
        residents = self._unshared(record)
        freed = await self.admission.drop(residents)
        if freed is None:
            held = "; ".join(self.describe(resident) for resident in residents)
            raise Leased(f"{record.entry.name} is in use, nothing was evicted: {held}")
        record.is_wanted = False
        self._tidy()
        return freed

    async def evict_idle(self) -> int | None:
        """Evict the component that was used least recently, if one may go; its bytes."""
        freed = await self.admission.drop_idle()
        self._tidy()
        return freed

    async def evict_all(self) -> None:
        """No thread may be at work. A sampler that maps an arena keeps it until it unmaps."""
        residents = list(self.admission.residents.values())
        for resident in residents:
            resident.busy.clear()
        await self.admission.drop(residents, even_if_leased=True)

    async def reap(self) -> None:
        """Remove what has no model and no user any more."""
        if await self._reaper.reap():
            self._tidy()

    async def _resume(self) -> None:
        """Go on with models that are whole though nobody asked here; without a config folder one waits to be asked."""
        for record in self.models:
            if record.config or record.source is None or len(self.parts(record)) < len(record.components):
                continue
            try:
                record.config = await self._publish(record, record.source)
                record.is_wanted = True
            except HeadwaterError as error:
                _log.warning("no config folder", model=record.entry.name, reason=str(error))

    async def _publish(self, record: ModelRecord, source: ModelSource) -> str:
        return await asyncio.to_thread(self._directory.publish_config, record.entry.name, source)

    async def _discard(self, resident: Resident) -> None:
        """Forget a failed component: what samplers map of it stays theirs."""
        while resident.busy:
            await self._changes.after(self._changes.version)
        await self.admission.drop([resident], even_if_leased=True)

    def _unshared(self, record: ModelRecord) -> list[Resident]:
        others = (other for other in self.models if other is not record and other.is_wanted)
        shared = {part.identity for other in others for part in other.components}
        return [resident for resident in self.admission.of(record.components) if resident.source.identity not in shared]

    def _tidy(self) -> None:
        """Drop config folders of models with nothing in memory, and tell who watches."""
        for record in self.models:
            if record.config and not self.parts(record):
                self._directory.remove_config(record.config)
                record.config, record.is_wanted = "", False
        self._changes.notify()
