"""Ways to bring checkpoint files into shared memory, each against a plain parallel read right before it.

    python bench/fill_methods.py --folder /tmp/sdxl [--target /dev/shm]

Each way puts every byte of the files' params behind one another into one file of the target folder and digests them, as
a loader must. Offsets in a checkpoint are no multiples of anything, so that O_DIRECT needs a buffer between; `in place`
shows what that costs, by reading whole blocks to where they may lie. A plain read puts each byte into anonymous memory
and no more. With a tmpfs mounted `huge=always` as the target, the same ways use huge pages.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import itertools
import mmap
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench import checkpoint
from bench.common import Figures, note, pick_device, report, table
from bench.disk import disk_rate, drop_page_cache, warm_up, weights
from bench.shapes import MODELS

CHUNK_BYTES = 8 << 20
SMALL_BYTES = 1 << 20  # stays in a core's cache from when its pages are zeroed until it is digested
BLOCK = 4096
POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, which Python has no name for


@dataclass(frozen=True)
class Piece:
    """Bytes of a file and where they go."""

    file: Path
    offset: int
    size_bytes: int
    at: int


def pieces_of(files: Sequence[Path]) -> list[Piece]:
    """The params of safetensors files in pieces, one behind the other, each file's from a page on."""
    pieces, at = [], 0
    for file in files:
        with file.open("rb") as opened:
            start = 8 + int.from_bytes(opened.read(8), "little")
        for offset in range(start, size := file.stat().st_size, CHUNK_BYTES):
            count = min(CHUNK_BYTES, size - offset)
            pieces.append(Piece(file, offset, count, at))
            at += count
        at = -(-at // BLOCK) * BLOCK
    return pieces


class Target:
    """A file in memory, mapped too; pages come when they are first written unless a way asks for them before."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.ftruncate(self.fd, size_bytes)
        self.map = mmap.mmap(self.fd, size_bytes)
        self.view = memoryview(self.map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.writing = threading.Lock()
        self.size_bytes = size_bytes

    def write(self, data: memoryview, at: int) -> None:
        with self.writing:
            os.pwrite(self.fd, data, at)

    def allocate(self) -> None:
        for start in range(0, self.size_bytes, 2 * CHUNK_BYTES):
            with self.writing:
                os.posix_fallocate(self.fd, start, min(2 * CHUNK_BYTES, self.size_bytes - start))

    def populate(self, at: int, size_bytes: int) -> None:
        """Have the pages of a range, in one call instead of a fault for each."""
        start = at // BLOCK * BLOCK
        _check(
            LIBC.madvise(
                ctypes.c_void_p(self.address + start), ctypes.c_size_t(at + size_bytes - start), POPULATE_WRITE
            )
        )


LIBC = ctypes.CDLL(None, use_errno=True)
Bring = Callable[[Target, int, Piece, memoryview], None]  # target, descriptor, piece, this thread's buffer


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _some(count: int) -> int:
    if not count:
        raise OSError(errno.EIO, "nothing was copied")
    return count


def _into_buffer(fd: int, piece: Piece, buffer: memoryview) -> memoryview:
    start = piece.offset // BLOCK * BLOCK
    end = -(-(piece.offset + piece.size_bytes) // BLOCK) * BLOCK
    os.preadv(fd, [buffer[: end - start]], start)
    return buffer[piece.offset - start : piece.offset - start + piece.size_bytes]


def bounce_pwrite(target: Target, fd: int, piece: Piece, buffer: memoryview) -> None:
    target.write(_into_buffer(fd, piece, buffer), piece.at)


def bounce_memmove(target: Target, fd: int, piece: Piece, buffer: memoryview) -> None:
    data = _into_buffer(fd, piece, buffer)
    source = ctypes.addressof(ctypes.c_char.from_buffer(data))
    ctypes.memmove(target.address + piece.at, source, piece.size_bytes)


def populate_memmove(target: Target, fd: int, piece: Piece, buffer: memoryview) -> None:
    target.populate(piece.at, piece.size_bytes)
    bounce_memmove(target, fd, piece, buffer)


def into_mapping(target: Target, fd: int, piece: Piece, buffer: memoryview) -> None:
    os.preadv(fd, [target.view[piece.at : piece.at + piece.size_bytes]], piece.offset)


def populate_into_mapping(target: Target, fd: int, piece: Piece, buffer: memoryview) -> None:
    target.populate(piece.at, piece.size_bytes)
    into_mapping(target, fd, piece, buffer)


def small_into_mapping(target: Target, fd: int, piece: Piece, buffer: memoryview) -> None:
    for done in range(0, piece.size_bytes, SMALL_BYTES):
        count = min(SMALL_BYTES, piece.size_bytes - done)
        populate_into_mapping(target, fd, Piece(piece.file, piece.offset + done, count, piece.at + done), buffer)


def blocks_into_mapping(target: Target, fd: int, piece: Piece, buffer: memoryview) -> None:
    """Not the right bytes at the right place: what it would cost if they could go there."""
    start, at = piece.offset // BLOCK * BLOCK, piece.at // BLOCK * BLOCK
    os.preadv(fd, [target.view[at : at + piece.size_bytes // BLOCK * BLOCK]], start)


def populate_blocks_into_mapping(target: Target, fd: int, piece: Piece, buffer: memoryview) -> None:
    target.populate(piece.at, piece.size_bytes)
    blocks_into_mapping(target, fd, piece, buffer)


def by_sendfile(target: Target, fd: int, piece: Piece, buffer: memoryview) -> None:
    out = os.open(f"/proc/self/fd/{target.fd}", os.O_WRONLY)  # a file position of its own
    try:
        os.lseek(out, piece.at, os.SEEK_SET)
        done = 0
        with target.writing:
            while done < piece.size_bytes:
                done += _some(os.sendfile(out, fd, piece.offset + done, piece.size_bytes - done))
    finally:
        os.close(out)


def by_copy_file_range(target: Target, fd: int, piece: Piece, buffer: memoryview) -> None:
    done = 0
    while done < piece.size_bytes:
        count = os.copy_file_range(fd, target.fd, piece.size_bytes - done, piece.offset + done, piece.at + done)
        done += _some(count)


@dataclass(frozen=True)
class Way:
    """How bytes travel: around the page cache or not, all pages asked for beside the reads or not."""

    bring: Bring
    direct: bool
    allocate: bool = False


WAYS = {
    "O_DIRECT, buffer, pwrite": Way(bounce_pwrite, direct=True),
    "O_DIRECT, buffer, fallocate + pwrite": Way(bounce_pwrite, direct=True, allocate=True),
    "O_DIRECT, buffer, memmove": Way(bounce_memmove, direct=True),
    "O_DIRECT, buffer, populate + memmove": Way(populate_memmove, direct=True),
    "O_DIRECT in place": Way(blocks_into_mapping, direct=True),
    "O_DIRECT in place, populate": Way(populate_blocks_into_mapping, direct=True),
    "read, buffer, pwrite": Way(bounce_pwrite, direct=False),
    "read, buffer, fallocate + pwrite": Way(bounce_pwrite, direct=False, allocate=True),
    "read in place": Way(into_mapping, direct=False),
    "read in place, populate": Way(populate_into_mapping, direct=False),
    "read in place, populate, 1 MiB at a time": Way(small_into_mapping, direct=False),
    "read in place, fallocate": Way(into_mapping, direct=False, allocate=True),
    "sendfile": Way(by_sendfile, direct=False),
    "copy_file_range": Way(by_copy_file_range, direct=False),
}


SOURCES = ("disk", "page cache")


@contextmanager
def opened(files: Sequence[Path], direct: bool) -> Iterator[dict[Path, int]]:
    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
    fds = {file: os.open(file, flags) for file in files}
    try:
        yield fds
    finally:
        for fd in fds.values():
            os.close(fd)


def bring_all(way: Way, files: Sequence[Path], folder: Path, threads: int, forget: bool) -> tuple[float, float]:
    """Bytes per second, and seconds of CPU for a GB. forget: leave nothing behind in the page cache."""
    pieces = pieces_of(files)
    path = folder / "params"
    target = Target(path, -(-(pieces[-1].at + pieces[-1].size_bytes) // BLOCK) * BLOCK)
    local = threading.local()

    def bring(piece: Piece) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = memoryview(mmap.mmap(-1, CHUNK_BYTES + 2 * BLOCK))
        way.bring(target, fds[piece.file], piece, local.buffer)
        xxhash.xxh3_128_digest(target.view[piece.at : piece.at + piece.size_bytes])
        if forget and not way.direct:
            os.posix_fadvise(fds[piece.file], piece.offset, piece.size_bytes, os.POSIX_FADV_DONTNEED)

    try:
        with opened(files, way.direct) as fds, ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(1) as beside:
            used, start = _cpu_s(), time.perf_counter()
            if way.allocate:
                beside.submit(target.allocate)
            for _ in pool.map(bring, pieces):
                pass
            beside.shutdown()
            seconds, cpu_s = time.perf_counter() - start, _cpu_s() - used
    finally:
        path.unlink()
    size = sum(piece.size_bytes for piece in pieces)
    return size / seconds, cpu_s / size * 1e9


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def rows(folder: Path, target: Path, options: argparse.Namespace) -> list[Figures]:
    """A row for each way and source; rounds outside, so that a slow minute meets all of them."""
    files = weights(folder)
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    refused: dict[tuple[str, str], str] = {}
    for _, source, (name, way) in itertools.product(range(options.rounds), options.sources, WAYS.items()):
        cached = source == "page cache"
        if (cached and way.direct) or (options.only and options.only not in name):
            continue
        ready = warm_up if cached else lambda files: drop_page_cache(folder)
        ready(files)
        plain = disk_rate(files, around_cache=not cached)
        ready(files)
        try:
            rate, cpu_s = bring_all(way, files, target, options.threads, not cached)
            found.setdefault((source, name), []).append((rate / plain, rate / 1e9, cpu_s))
            note(f"{name}, from {source}", {"gb_s": rate / 1e9, "cpu_s_per_gb": cpu_s, "to_plain": rate / plain})
        except OSError as error:
            refused[source, name] = error.strerror or str(error)
    table_rows: list[Figures] = []
    for (source, name), figures in found.items():
        ratio, rate, cpu_s = sorted(figures)[len(figures) // 2]
        table_rows.append({"way": name, "from": source, "gb_s": rate, "cpu_s_per_gb": cpu_s, "to_plain": ratio})
    return table_rows + [
        {"way": name, "from": source, "gb_s": why, "cpu_s_per_gb": None, "to_plain": None}
        for (source, name), why in refused.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sdxl")
    parser.add_argument("--folder", type=Path, help="written by bench/checkpoint.py; made if it is not there")
    parser.add_argument("--target", type=Path, default=Path("/dev/shm"), help="a folder in memory")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the code")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES, help="where the bytes come from")
    parser.add_argument("--only", help="ways whose name has this in it")
    options = parser.parse_args(arguments)
    with (
        checkpoint.there(options.model, options.folder, options.tiny) as (folder, _),
        tempfile.TemporaryDirectory(dir=options.target) as target,
    ):
        figures = rows(folder, Path(target), options)
    table(f"ways to fill, {options.threads} threads", list(figures[0]), [list(row.values()) for row in figures])
    report("fill_methods", pick_device(), {"threads": options.threads, "target": str(options.target), "ways": figures})


if __name__ == "__main__":
    main()
