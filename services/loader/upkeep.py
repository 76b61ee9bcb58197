"""What an operator does with an arena folder beside serving from it: see whether it is sound, and clear it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from services.errors import HeadwaterError
from services.loader.arenas import ARENA_SUFFIX, ArenaDir
from services.loader.config import Upkeep
from services.loader.entries import ConfigError
from services.loader.fill import Filler
from services.params.arena import ExtentState
from services.params.owned_arena import OwnedArena

GIB = 1 << 30
# They hold data with a digest, which the second's has yet to be compared with.
_FILLED = (ExtentState.READY, ExtentState.VERIFYING)


@dataclass
class Report:
    """One file of the folder."""

    name: str
    size_bytes: int = 0
    filled_count: int = 0
    extent_count: int = 0
    damaged: list[int] = field(default_factory=list)  # extents whose data has not the digest that it was published with
    reason: str = ""  # why it is no arena

    @property
    def is_sound(self) -> bool:
        return not self.damaged and not self.reason

    def __str__(self) -> str:
        if self.reason:
            return f"{self.name}: {self.reason}"
        verdict = f"damaged extents: {', '.join(map(str, self.damaged))}" if self.damaged else "sound"
        filled = f"{self.filled_count} of {self.extent_count} extents filled"
        return f"{self.name}: {self.size_bytes / GIB:.2f} GiB, {filled}, {verdict}"


def run(upkeep: Upkeep) -> int:
    """Do what was asked, a line for each file; 1 if something is not as it should be. Raises ConfigError."""
    if not upkeep.arena_dir.is_dir():
        raise ConfigError(f"there is no folder {upkeep.arena_dir}")
    return clean(upkeep.arena_dir) if upkeep.task == "clean" else asyncio.run(_check(upkeep))


async def check(folder: Path, filler: Filler) -> AsyncIterator[Report]:
    """Compare all that is filled with its digests; reads only, so a loader and samplers may be at work meanwhile."""
    for path in sorted(folder.glob(f"*{ARENA_SUFFIX}")):
        try:
            arena = OwnedArena.open(path)
        except HeadwaterError as error:
            yield Report(path.name, reason=str(error))
            continue
        try:
            yield await _report(arena, filler)
        finally:
            arena.close()


def clean(folder: Path) -> int:
    """Remove what no loader owns and no sampler maps; 1 if something stays."""
    directory = ArenaDir.open(folder, allow_disk=True)
    freed_bytes, kept = directory.clear()
    directory.close()
    for name in kept:
        print(f"{name}: stays, a sampler maps it")  # noqa: T201
    print(f"{freed_bytes / GIB:.2f} GiB given back, {len(kept)} arenas stay")  # noqa: T201
    return 1 if kept else 0


async def _check(upkeep: Upkeep) -> int:
    filler = Filler(upkeep.fill_threads)
    start, size_bytes, unsound, count = time.monotonic(), 0, 0, 0
    try:
        async for report in check(upkeep.arena_dir, filler):
            print(report, flush=True)  # noqa: T201
            count += 1
            size_bytes += report.size_bytes
            unsound += not report.is_sound
    finally:
        filler.close()
    seconds = time.monotonic() - start
    print(f"{count} arenas, {size_bytes / GIB:.2f} GiB, {unsound} not sound, {seconds:.1f} s")  # noqa: T201
    return 1 if unsound else 0


async def _report(arena: OwnedArena, filler: Filler) -> Report:
    states = arena.states()
    filled = [number for number, state in enumerate(states) if state in _FILLED]
    digests = await asyncio.gather(*(filler.digest(arena, number) for number in filled))
    damaged = [number for number, digest in zip(filled, digests, strict=True) if digest != arena.digest(number)]
    return Report(arena.path.name, arena.file_bytes, len(filled), len(states), damaged)
