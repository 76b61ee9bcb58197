"""Which components are in memory: reserves arenas for a model, all or none, and evicts others to make room."""

import asyncio
from collections.abc import Callable, Iterable

import structlog

from services.errors import HostMemoryFull
from services.loader.arenas import ArenaDir
from services.loader.catalog import ComponentSource
from services.loader.records import Resident
from services.params.arena import OwnedArena

_log = structlog.get_logger()


class Admission:
    """Residents by identity. Its coroutines must not run at the same time: the store holds one lock around them."""

    def __init__(self, directory: ArenaDir, budget_bytes: int | None, label: Callable[[Resident], str]) -> None:
        self.residents: dict[str, Resident] = {}
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

    async def reserve(self, sources: Iterable[ComponentSource], may_evict: bool) -> None:
        """Reserve an arena for each component that has none. Raises HostMemoryFull; then nothing new is reserved."""
        wanted = {source.identity: source for source in sources}
        missing = [source for source in wanted.values() if source.identity not in self.residents]
        headers = [self._directory.header(source) for source in missing]
        need = sum(header.file_bytes for header in headers)
        await self._make_room(need, set(wanted), may_evict)
        created = await asyncio.gather(
            *(asyncio.to_thread(self._directory.create, header) for header in headers), return_exceptions=True
        )
        arenas = [arena for arena in created if isinstance(arena, OwnedArena)]
        if failures := [error for error in created if isinstance(error, BaseException)]:
            for arena in arenas:
                await _remove(arena)
            raise self._full(need) if isinstance(failures[0], HostMemoryFull) else failures[0]
        for source, arena in zip(missing, arenas, strict=True):
            self.residents[source.identity] = Resident.of(arena, source)

    async def drop(self, resident: Resident, even_if_leased: bool = False) -> int:
        """Evict a component that no thread works on; the bytes given back, 0 if a sampler maps it."""
        assert not resident.busy
        if not resident.arena.unlink(even_if_leased):
            return 0
        resident.is_gone = True
        del self.residents[resident.source.identity]
        _log.info("evicted", component=self._label(resident), size_bytes=resident.arena.file_bytes)
        await asyncio.to_thread(resident.arena.close)
        return resident.arena.file_bytes

    async def _make_room(self, need: int, keep: set[str], may_evict: bool) -> None:
        if need <= self._room():
            return
        idle = [r for r in self.residents.values() if r.source.identity not in keep and not r.is_in_use]
        if not may_evict or need > self._room() + sum(resident.arena.file_bytes for resident in idle):
            raise self._full(need)
        for resident in sorted(idle, key=lambda resident: resident.last_used):
            if need <= self._room():
                return
            await self.drop(resident)
        if need > self._room():
            raise self._full(need)

    def _room(self) -> int:
        free = self._directory.free_bytes()
        if self._budget_bytes is None:
            return free
        return min(free, self._budget_bytes - sum(resident.arena.file_bytes for resident in self.residents.values()))

    def _full(self, need: int) -> HostMemoryFull:
        budget = "" if self._budget_bytes is None else f" of a budget of {_mib(self._budget_bytes)}"
        held = [
            f"{self._label(resident)} {_mib(resident.arena.file_bytes)}{' in use' if resident.is_in_use else ''}"
            for resident in self.residents.values()
        ]
        return HostMemoryFull(
            f"no room in host memory: {_mib(need)} needed, {_mib(max(0, self._room()))} free{budget};"
            f" held: {', '.join(held) or 'nothing'}"
        )


async def _remove(arena: OwnedArena) -> None:
    arena.unlink(even_if_leased=True)
    await asyncio.to_thread(arena.close)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"
