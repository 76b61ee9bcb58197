"""Which components are in memory: reserves arenas for a model, all or none, and evicts others to make room."""

import asyncio
from collections.abc import Callable, Iterable, Sequence

import structlog

from services.errors import HostMemoryFull
from services.loader.arenas import ArenaDir
from services.loader.catalog import ComponentSource
from services.loader.records import Resident

_log = structlog.get_logger()


class Admission:
    """Residents by identity. Its coroutines must not run at the same time: the store holds one lock around them."""

    def __init__(
        self,
        directory: ArenaDir,
        budget_bytes: int | None,
        label: Callable[[Resident], str],
        is_pinned: Callable[[Resident], bool],
    ) -> None:
        self.residents: dict[str, Resident] = {}
        self._is_pinned = is_pinned
        self._directory = directory
        self._budget_bytes = budget_bytes
        self._label = label

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
        wanted = {source.identity: source for source in sources}
        missing = [source for source in wanted.values() if source.identity not in self.residents]
        headers = [self._directory.header(source) for source in missing]
        need = sum(header.file_bytes for header in headers)
        await self._make_room(need, set(wanted), may_evict)
        new: list[Resident] = []
        try:
            for header, source in zip(headers, missing, strict=True):
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

    def _idle(self, keep: set[str]) -> list[Resident]:
        """What may go to make room, used least recently first."""
        idle = [
            resident
            for resident in self.residents.values()
            if resident.source.identity not in keep and not self._is_pinned(resident) and not resident.is_in_use
        ]
        return sorted(idle, key=lambda resident: resident.last_used)

    async def _make_room(self, need: int, keep: set[str], may_evict: bool) -> None:
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

    def _why_it_stays(self, resident: Resident) -> str:
        return " pinned" if self._is_pinned(resident) else " in use" if resident.is_in_use else ""

    def _room(self) -> int:
        free = self._directory.free_bytes()
        if self._budget_bytes is None:
            return free
        return min(free, self._budget_bytes - sum(resident.arena.file_bytes for resident in self.residents.values()))

    def _full(self, need: int) -> HostMemoryFull:
        budget = "" if self._budget_bytes is None else f" of a budget of {_mib(self._budget_bytes)}"
        held = [
            f"{self._label(resident)} {_mib(resident.arena.file_bytes)}{self._why_it_stays(resident)}"
            for resident in self.residents.values()
        ]
        return HostMemoryFull(
            f"no room in host memory: {_mib(need)} needed, {_mib(max(0, self._room()))} free{budget};"
            f" held: {', '.join(held) or 'nothing'}"
        )


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
