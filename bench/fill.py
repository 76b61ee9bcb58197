"""Filling from disk and from the page cache against plain parallel reads of the same files, and what memory it takes.

    python bench/fill.py --model sdxl --folder /tmp/sdxl

A plain read puts each byte into anonymous memory once, with threads enough to be fast, and keeps it, as who loads them
must. A fill is a loader's eager load, from when it serves until all is READY. They alternate, for disks are not even: a
fill's rate is taken by the mean of the plain reads before and after it.
Memory is the arenas, the files' pages in the page cache and the loader's own, looked at all the while.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench import checkpoint
from bench.common import GIB, Figures, note, pick_device, report, table
from bench.disk import cached_pages, disk_rate, drop_page_cache, warm_up, weights
from bench.process import cpu_s, own_bytes
from bench.shapes import MODELS
from tests.sampler.inprocess import prepared
from tests.stack import Process, Stack, running

WAYS = ("disk", "page cache")
ALLOWED_FACTOR, ALLOWED_BYTES = 1.05, 200 << 20


class HostMemory:
    """The most that arenas, a checkpoint's pages in the page cache and the loader took together, bytes."""

    def __init__(self, stack: Stack, files: Sequence[Path], loader: Process) -> None:
        self.peak_bytes = 0
        self._stack, self._files, self._loader = stack, files, loader

    def look(self) -> int:
        arenas = sum(file.stat().st_blocks * 512 for file in self._stack.arena_dir.glob("*.arena"))
        cached = sum(map(cached_pages, self._files)) * os.sysconf("SC_PAGE_SIZE")
        own = own_bytes(self._loader.pid)
        self.peak_bytes = max(self.peak_bytes, arenas + cached + own)
        return arenas + cached + own

    @contextmanager
    def watched(self) -> Iterator[None]:
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.2):
                self.look()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def fill(folder: Path, size: int, *flags: str) -> Figures:
    """One eager load."""
    with tempfile.TemporaryDirectory() as disk, running(Path(disk), {"m": folder}) as stack:
        loader = stack.loader("--eager-load", *flags, extent_bytes="64MiB")
        memory, start = HostMemory(stack, weights(folder), loader), time.perf_counter()
        with memory.watched():
            prepared(stack, "m")
            seconds = time.perf_counter() - start
        after = memory.look()
        used_s = cpu_s(loader.pid)
    return {
        "fill_gb_s": size / seconds / 1e9,
        "fill_cpu_s": used_s,
        "peak_to_model": memory.peak_bytes / size,
        "after_to_model": after / size,
        "within_limit": memory.peak_bytes <= ALLOWED_FACTOR * size + ALLOWED_BYTES,
    }


def rounds(folder: Path, options: argparse.Namespace) -> list[Figures]:
    """A row for each way and round: a fill between two plain reads, one of which is the next fill's too."""
    files = weights(folder)
    size = sum(file.stat().st_size for file in files)
    rows: list[Figures] = []
    for way in options.ways:
        is_cached = way == "page cache"

        def ready(is_cached: bool = is_cached) -> None:
            warm_up(files) if is_cached else drop_page_cache(folder)

        def plain(is_cached: bool = is_cached) -> float:
            ready()
            return disk_rate(files, around_cache=not is_cached, keep=True) / 1e9

        before = plain()
        for number in range(options.rounds):
            ready()
            filled = fill(folder, size, "--fill-threads", str(options.threads))
            after = plain()
            ratio = 2 * float(str(filled["fill_gb_s"])) / (before + after)
            told = {"from": way, "round": number, "plain_before_gb_s": before, "plain_after_gb_s": after}
            rows.append({**told, **filled, "fill_to_plain": ratio})
            note(f"from {way}", rows[-1])
            before = after
    return rows


def claims(rows: Sequence[Figures]) -> Figures:
    """The medians, and whether memory was always within the limit."""

    def median(way: str) -> float | None:
        ratios = [float(str(row["fill_to_plain"])) for row in rows if row["from"] == way]
        return statistics.median(ratios) if ratios else None

    return {
        "disk_fill_to_plain": median("disk"),
        "page_cache_fill_to_plain": median("page cache"),
        "memory_within_limit": all(row["within_limit"] is True for row in rows if row["from"] == "disk"),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sdxl")
    parser.add_argument("--folder", type=Path, help="written by bench/checkpoint.py; made if it is not there")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the code")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="where the bytes come from")
    parser.add_argument("--threads", type=int, default=16, help="the loader's --fill-threads")
    options = parser.parse_args(arguments)
    with checkpoint.there(options.model, options.folder, options.tiny) as (folder, _):
        rows = rounds(folder, options)
        size = sum(file.stat().st_size for file in weights(folder))
    figures = claims(rows)
    table(f"{size / GIB:.2f} GiB, {options.threads} threads", list(rows[0]), [list(row.values()) for row in rows])
    table("claims", ("", ""), list(figures.items()))
    report("fill", pick_device(), {"bytes": size, "threads": options.threads, "rounds": rows, **figures})


if __name__ == "__main__":
    main()
