"""More models than the budget holds, readers that use them at random, and somebody who watches the memory meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from services.loader.catalog import read_model
from services.loader.entries import ModelEntry
from services.params.header import Header
from tests.loader.support import ROOT, Workbench, environment

MODELS = "abc"
EXTENT_BYTES = 16 << 10  # a workbench's loader has them
NONE = "00" * 16


def arena_bytes(folder: Path) -> int:
    """What a model's arenas take."""
    parts = read_model(ModelEntry("m", folder), EXTENT_BYTES).components
    return sum(Header(part.name, NONE, NONE, part.identity, part.layout).file_bytes for part in parts)


class Watch:
    """Looks at an arena folder again and again: what is in it, and whether what readers lease is."""

    def __init__(self, folder: Path, readers: set[int]) -> None:
        self.seen = Counter(looks=0, peak_bytes=0, lost_leases=0)
        self._folder = folder
        self._readers = readers
        self._held: set[tuple[int, int]] = set()  # leases on arenas that were there at the last look

    def look(self) -> None:
        leased = self._leased()
        arenas = self._arenas()
        there = {arena.st_ino for arena in arenas}
        # What is let go is soon evicted, and who came too late has a lock until he notices: neither is a loss.
        lost = {lease for lease in self._held & leased & self._leased() if lease[1] not in there}
        self._held = {lease for lease in leased if lease[1] in there}
        self.seen["looks"] += 1
        self.seen["lost_leases"] += len(lost)
        size_bytes = sum(max(arena.st_size, arena.st_blocks * 512) for arena in arenas)
        self.seen["peak_bytes"] = max(self.seen["peak_bytes"], size_bytes)

    def _arenas(self) -> list[os.stat_result]:
        """All arenas that there were at one moment: what the listing has and is there after it."""
        found = []
        for name in os.listdir(self._folder):  # noqa: PTH208 - one call of the kernel
            if name.endswith(".arena"):
                try:
                    found.append((self._folder / name).lstat())
                except FileNotFoundError:
                    continue
        return found

    def _leased(self) -> set[tuple[int, int]]:
        """(reader, inode) of every shared lock that the kernel says the readers hold."""
        locks = (line.split() for line in Path("/proc/locks").read_text().splitlines())
        return {
            (int(lock[4]), int(lock[5].rpartition(":")[2]))
            for lock in locks
            if lock[1] == "FLOCK" and lock[3] == "READ" and int(lock[4]) in self._readers
        }


def start_tenants(bench: Workbench, count: int, seconds: float, seed: int) -> list[subprocess.Popen[str]]:
    models = [f"{name}={folder}" for name, folder in bench.folders.items()]
    base = [sys.executable, "-m", "tests.loader.tenant", bench.address, str(bench.arena_dir)]
    return [
        subprocess.Popen(
            [*base, str(seed + number), str(seconds), *models],
            cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True,
        )
        for number in range(count)
    ]  # fmt: skip


def rotate(bench: Workbench, seconds: float, seed: int, width: int = 64, tenant_count: int = 3) -> dict[str, int]:
    """Three models, a budget for two and a bit, and readers for so long: all that was seen."""
    for number, name in enumerate(MODELS):
        bench.add_model(name, seed + number, width=width)
    largest = max(arena_bytes(folder) for folder in bench.folders.values())
    budget_bytes = largest * 9 // 4
    with bench.loader("--host-budget", str(budget_bytes)):
        tenants = start_tenants(bench, tenant_count, seconds, seed)
        watch = Watch(bench.arena_dir, {tenant.pid for tenant in tenants})
        while any(tenant.poll() is None for tenant in tenants):
            watch.look()
        tallies = [Counter(json.loads(tenant.communicate()[0])) for tenant in tenants]
    found: dict[str, int] = {key: sum(tally[key] for tally in tallies) for key in tallies[0]}
    found["lost_leases"] += watch.seen.pop("lost_leases")
    evicted = bench.log.read_text().count("event=evicted")
    return found | watch.seen | {"budget_bytes": budget_bytes, "evictions": evicted}
