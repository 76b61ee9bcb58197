"""What the host has back after an eviction: free pages and room on the tmpfs, in shares of the model's size.

    python bench/evict.py --mib 576

Nobody maps the model; a reader has locked its pages under its lease, by mlock or for a CUDA device if there is one,
which is refused, and lets go; a reader gave its lease back and maps the model still, which is evicted, and unmaps.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "gen")]

from headwater.loader.v1 import loader_pb2 as pb

from bench.common import Figures, note, pick_device, report
from services.errors import Leased
from services.rpc.loader_client import LoaderClient
from tests.loader.puppet import Puppet, puppet
from tests.loader.support import Workbench, prepared, workbench

BLOCK_COUNT = 9  # of two components together


class Free:
    """Free memory since `start`, in shares of a size."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self._folder = folder
        self._size_bytes = size_bytes
        self._start = self._now()

    def _now(self) -> tuple[int, int]:
        # MemFree leaves out pages that the kernel keeps at hand for each CPU, up to gigabytes; zoneinfo has both.
        pages = re.findall(r"(?:nr_free_pages|\bcount:) +(\d+)", Path("/proc/zoneinfo").read_text())
        room = os.statvfs(self._folder)
        return sum(map(int, pages)) * os.sysconf("SC_PAGE_SIZE"), room.f_bfree * room.f_frsize

    def rise(self) -> Figures:
        """How much has become free, of the host's memory and on the tmpfs."""
        pairs = zip(("memory", "tmpfs"), self._now(), self._start, strict=True)
        return {name: round((now - before) / self._size_bytes, 3) for name, now, before in pairs}


def held(bench: Workbench, model: pb.Model, stack: ExitStack) -> list[Puppet]:
    """A reader for each component."""
    return [stack.enter_context(puppet(bench.arena_dir / part.arena, part.generation)) for part in model.components]


def tell(readers: list[Puppet], *words: str) -> list[str]:
    return [reader.tell(word) for word in words for reader in readers]


async def idle(client: LoaderClient, free: Free) -> Figures:
    await client.evict("m")
    return {"evicted": True, "after_eviction": free.rise()}


async def locked(client: LoaderClient, free: Free, readers: list[Puppet]) -> Figures:
    return await _locked(client, free, readers, "lock", "unlock")


async def registered(client: LoaderClient, free: Free, readers: list[Puppet]) -> Figures:
    return await _locked(client, free, readers, "register", "unregister")


async def _locked(client: LoaderClient, free: Free, readers: list[Puppet], lock: str, unlock: str) -> Figures:
    tell(readers, "digest")
    answers = tell(readers, lock)
    try:
        await client.evict("m")
        refused = False
    except Leased:
        refused = True
    before = free.rise()
    tell(readers, unlock, "close", "drop")
    await client.evict("m")
    return {"answers": answers, "refused": refused, "while_leased": before, "after_eviction": free.rise()}


async def without_lease(client: LoaderClient, free: Free, readers: list[Puppet]) -> Figures:
    before = tell(readers, "digest")
    tell(readers, "close")
    await client.evict("m")
    evicted = free.rise()
    same = tell(readers, "digest") == before
    tell(readers, "drop")
    return {"same_bytes": same, "after_eviction": evicted, "after_unmapping": free.rise()}


async def measure(bench: Workbench) -> Figures:
    figures: Figures = {}
    async with LoaderClient(bench.address) as client:
        for case in (idle, locked, *([registered] if torch.cuda.is_available() else []), without_lease):
            model = await prepared(client, "m")
            await asyncio.sleep(1)  # what was read leaves the page cache meanwhile
            size = sum(part.size_bytes for part in model.components)
            with ExitStack() as stack:
                readers = () if case is idle else (held(bench, model, stack),)
                figures[case.__name__] = await case(client, Free(bench.arena_dir, size), *readers)
    return {"mib": round(size / (1 << 20), 1)} | figures


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=576, help="size of the model, about")
    parser.add_argument("--tiny", action="store_true", help="a model of 1 MiB, to try the code")
    options = parser.parse_args(arguments)
    mib = 1 if options.tiny else options.mib
    width = int((mib * (1 << 20) / 4 / BLOCK_COUNT) ** 0.5)
    with tempfile.TemporaryDirectory() as disk, workbench(Path(disk)) as bench:
        bench.add_model("m", width=width)
        with bench.loader():
            figures = asyncio.run(measure(bench))
    for case, found in figures.items():
        note(case, found if isinstance(found, dict) else {"size": found})
    report("evict", pick_device(), figures)


if __name__ == "__main__":
    main()
