"""How fast new shared memory comes, by call and by threads: the floor under every fill.

    python bench/provision.py [--target /dev/shm] [--gib 4]

One file in the target folder, in steps of 8 MiB shared out among threads; a row says what it takes to have every page
there, and, with `pwrite` and `memset`, a byte written to each.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench.common import GIB, Figures, pick_device, report, table
from services.params.mapping import address_of, populate

STEP_BYTES = 8 << 20
DATA = bytes(STEP_BYTES)

Step = Callable[[int, int], object]  # file descriptor, where the step begins


def fallocate(fd: int, at: int) -> None:
    os.posix_fallocate(fd, at, STEP_BYTES)


def pwrite(fd: int, at: int) -> None:
    os.pwrite(fd, DATA, at)


def mapped(fd: int, at: int, work: Callable[[int], object]) -> None:
    with mmap.mmap(fd, STEP_BYTES, offset=at) as memory, memoryview(memory) as view:
        work(address_of(view))


def populated(fd: int, at: int) -> None:
    mapped(fd, at, lambda address: populate(address, STEP_BYTES))


def memset(fd: int, at: int) -> None:
    mapped(fd, at, lambda address: ctypes.memset(address, 1, STEP_BYTES))


WAYS: dict[str, tuple[Step, ...]] = {
    "fallocate": (fallocate,),
    "pwrite": (pwrite,),
    "fallocate, then pwrite": (fallocate, pwrite),
    "populate": (populated,),
    "fallocate, then populate": (fallocate, populated),
    "memset": (memset,),
    "populate, then memset": (populated, memset),
}


def run(steps: tuple[Step, ...], folder: Path, size: int, threads: int) -> Figures:
    path = folder / "new"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        os.ftruncate(fd, size)
        used, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            for step in steps:
                for _ in pool.map(lambda at, step=step: step(fd, at), range(0, size, STEP_BYTES)):
                    pass
        seconds, now = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    finally:
        os.close(fd)
        path.unlink()
    cpu_s = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return {"gb_s": size / seconds / 1e9, "cpu_s_per_gb": cpu_s / size * 1e9}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=Path("/dev/shm"), help="a folder in memory")
    parser.add_argument("--gib", type=float, default=4, help="size of the file")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tiny", action="store_true", help="little memory, to try the code")
    options = parser.parse_args(arguments)
    size = 2 * STEP_BYTES if options.tiny else int(options.gib * GIB) // STEP_BYTES * STEP_BYTES
    with tempfile.TemporaryDirectory(dir=options.target) as folder:
        rows = [
            {"way": name, "threads": threads, **run(steps, Path(folder), size, threads)}
            for name, steps in WAYS.items()
            for threads in options.threads
        ]
    table(f"{size / GIB:.2f} GiB of new memory", list(rows[0]), [list(row.values()) for row in rows])
    report("provision", pick_device(), {"target": str(options.target), "rows": rows})


if __name__ == "__main__":
    main()
