"""Which components are in memory: reserves arenas for a model, all or none, and evicts others to make room."""

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Sequence

import structlog

from services.errors import HostMemoryFull
from services.loader.arenas import ArenaDir
from services.loader.catalog import ComponentSource
from services.loader.cgroup import UNLIMITED
from services.loader.records import Resident

_log = structlog.get_logger()


class Admission:
    """Residents by identity. Its coroutines must not run at the same time: the store holds one lock around them.

    is_pinned: whether a component must stay; describe: what people call one, and who uses it.
    """

    def __init__(
        self,
        directory: ArenaDir,
        budget_bytes: int | None,
        is_pinned: Callable[[Resident], bool],
        describe: Callable[[Resident], str],
    ) -> None:
        self.residents: dict[str, Resident] = {}
        self._is_pinned = is_pinned
        self._directory = directory
        self._budget_bytes = budget_bytes
        self._describe = describe

    def of(self, sources: Iterable[ComponentSource]) -> list[Resident]:
        return [self.residents[source.identity] for source in sources if source.identity in self.residents]

    def adopt(self, sources: Iterable[ComponentSource]) -> list[Resident]:
        """Take over what a dead loader left of `sources`; the rest of what it left is removed."""
        known = {source.identity: source for source in sources}
        for identity, arena in self._directory.adopt(known.values()).items():
            self.residents[identity] = Resident.of(arena, known[identity])
        return list(self.residents.values())

    async def begin(self, sources: Iterable[ComponentSource], may_evict: bool) -> list[Resident]:
        """Begin an arena for each component that has none, with room made for all of them; the new ones.

        They may be filled from now on; samplers can have them after `reserve`. Raises HostMemoryFull; then nothing new
        is there.
        """
        sources = tuple(sources)
        self._check_budget(sources)
        headers = [(self._directory.header(source), source) for source in self._missing(sources)]
        need = sum(header.file_bytes for header, _ in headers)
        await self._make_room(need, _identities(sources), may_evict)
        new: list[Resident] = []
        try:
            for header, source in headers:
                new.append(Resident.of(self._directory.create(header), source))
        except BaseException as error:
            for resident in new:
                resident.arena.unlink(even_if_leased=True)
                resident.arena.close()
            if isinstance(error, HostMemoryFull):
                raise self._full(need) from error
            raise
        self.residents |= {resident.source.identity: resident for resident in new}
        return new

    async def reserve(self, new: Sequence[Resident]) -> None:
        """Reserve all memory of what `begin` gave. Raises HostMemoryFull; what is there has to be dropped then."""
        reserving = (asyncio.to_thread(resident.arena.reserve) for resident in new)
        failures = [error for error in await asyncio.gather(*reserving, return_exceptions=True) if error is not None]
        if failures:
            need = sum(resident.arena.file_bytes for resident in new)
            raise self._full(need) if isinstance(failures[0], HostMemoryFull) else failures[0]

    async def drop(self, residents: Sequence[Resident], even_if_leased: bool = False) -> int | None:
        """Evict components together; the bytes given back, or None with nothing done if any of them is in use.

        `even_if_leased` removes their names all the same; no thread may work on them then.
        """
        if not even_if_leased and not _lock_all(residents):
            return None
        for resident in residents:  # no await before all are out of reach
            assert not resident.busy
            resident.arena.unlink(even_if_leased=True)
            resident.is_gone = True
            del self.residents[resident.source.identity]
        for resident in residents:
            await asyncio.to_thread(resident.arena.close)
            _log.info("evicted", arena=resident.arena.path.name, size_bytes=resident.arena.file_bytes)
        return sum(resident.arena.file_bytes for resident in residents)

    async def drop_idle(self) -> int | None:
        """Evict the component that was used least recently of those that may go; its bytes, None if there is none."""
        for resident in self._idle(set()):
            if freed := await self.drop([resident]):
                return freed
        return None

    async def drop_unknown(self, known: Collection[str]) -> bool:
        """Evict components of none of these identities as far as nobody uses them; whether any went."""
        unknown = [resident for identity, resident in self.residents.items() if identity not in known]
        return any([await self.drop([resident]) for resident in unknown])

    def note_leases(self) -> None:
        """What samplers map now is used now."""
        for resident in self.residents.values():
            if resident.arena.is_leased():
                resident.last_used = time.monotonic()

    def lease_for(self, sources: Iterable[ComponentSource], asked: Collection[Resident]) -> Resident | None:
        """The leased component, used least recently, that should be asked back to make room for `sources`.

        None if all that could go would not be room enough, or all has been `asked`.
        """
        sources = tuple(sources)
        need = self._directory.arena_bytes(self._missing(sources))
        may_go = self._may_go(_identities(sources))
        if need > self._room() + sum(resident.arena.file_bytes for resident in may_go):
            return None
        leased = [resident for resident in may_go if resident not in asked and resident.arena.is_leased()]
        return min(leased, key=_last_used, default=None)

    def _missing(self, sources: Iterable[ComponentSource]) -> list[ComponentSource]:
        wanted = {source.identity: source for source in sources}
        return [source for identity, source in wanted.items() if identity not in self.residents]

    def _may_go(self, keep: Collection[str]) -> list[Resident]:
        """What may go to make room as soon as no sampler maps it, used least recently first."""
        may_go = (
            resident
            for identity, resident in self.residents.items()
            if identity not in keep and not self._is_pinned(resident) and not resident.user_count and not resident.busy
        )
        return sorted(may_go, key=_last_used)

    def _idle(self, keep: Collection[str]) -> list[Resident]:
        return [resident for resident in self._may_go(keep) if not resident.arena.is_leased()]

    async def _make_room(self, need: int, keep: Collection[str], may_evict: bool) -> None:
        if need <= self._room():
            return
        idle = self._idle(keep)
        if not may_evict or need > self._room() + sum(resident.arena.file_bytes for resident in idle):
            raise self._full(need)
        for resident in idle:
            if need <= self._room():
                return
            await self.drop([resident])
        if need > self._room():
            raise self._full(need)

    def _room(self) -> int:
        return min(self._directory.free_bytes(), self._budget_room())

    def _budget_room(self) -> int:
        if self._budget_bytes is None:
            return UNLIMITED
        return self._budget_bytes - sum(resident.arena.file_bytes for resident in self.residents.values())

    def _check_budget(self, sources: Iterable[ComponentSource]) -> None:
        """Raises HostMemoryFull for what the budget can never hold."""
        need = self._directory.arena_bytes(sources)
        if self._budget_bytes is not None and need > self._budget_bytes:
            have = _mib(self._budget_bytes)
            raise HostMemoryFull(f"the model needs {_mib(need)} and --host-budget is {have}: raise it")

    def _full(self, need: int) -> HostMemoryFull:
        budget = "" if self._budget_bytes is None else f" of a budget of {_mib(self._budget_bytes)}"
        held = [
            f"{self._describe(resident)}, {_mib(resident.arena.file_bytes)}" for resident in self.residents.values()
        ]
        return HostMemoryFull(
            f"no room in host memory: {_mib(need)} needed, {_mib(max(0, self._room()))} free{budget};"
            f" held: {'; '.join(held) or 'nothing'}; the limit is {self._limit()}"
        )

    def _limit(self) -> str:
        """What an operator would enlarge to have more room."""
        rooms = self._directory.rooms()
        tightest = min(rooms, key=rooms.__getitem__)
        return "--host-budget" if self._budget_room() < rooms[tightest] else tightest


def _identities(sources: Iterable[ComponentSource]) -> set[str]:
    return {source.identity for source in sources}


def _last_used(resident: Resident) -> float:
    return resident.last_used


def _lock_all(residents: Sequence[Resident]) -> bool:
    """Lock all arenas, or none if one is in use."""
    locked: list[Resident] = []
    for resident in residents:
        if resident.user_count or resident.busy or not resident.arena.lock():
            for other in locked:
                other.arena.unlock()
            return False
        locked.append(resident)
    return True


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"
