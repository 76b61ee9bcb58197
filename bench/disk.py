"""A checkpoint's files on disk: out of the page cache, and how fast they can be read."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

READERS, PIECE_BYTES = 16, 32 << 20


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


def drop_page_cache(folder: Path) -> bool:
    """Have the kernel forget the folder's files, and nothing else; whether it did: it cannot in memory (tmpfs)."""
    os.sync()  # it keeps what is not written yet
    files = [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size]
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return not any(map(cached_pages, files))


def warm_up(files: Sequence[Path]) -> None:
    """Have all bytes in the page cache."""
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.read(64 << 20):
                pass


def cached_pages(file: Path) -> int:
    """Pages of a file that the page cache has."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        data = np.frombuffer(mapped, np.uint8)
        pages = np.zeros(-(-data.nbytes // mmap.PAGESIZE), np.uint8)
        address, size, answer = map(ctypes.c_size_t, (data.ctypes.data, data.nbytes, pages.ctypes.data))
        del data  # else the file stays mapped
        if ctypes.CDLL(None, use_errno=True).mincore(address, size, answer):
            raise OSError(ctypes.get_errno(), "mincore")
        return int((pages & 1).sum())


def disk_rate(files: list[Path], around_cache: bool = True, keep: bool = False) -> float:
    """Bytes per second of a plain parallel read of the files into anonymous memory, each byte once.

    around_cache: as O_DIRECT does; else the page cache gives what it has.
    keep: into memory for all of them, as who loads them has to; else into buffers that are given back at once.
    """
    sizes = [file.stat().st_size for file in files]
    pieces = [(n, at) for n, size in enumerate(sizes) for at in range(0, size, PIECE_BYTES)]
    starts = [sum(-(-size // PIECE_BYTES) * PIECE_BYTES for size in sizes[:n]) for n in range(len(sizes) + 1)]

    def read(piece: tuple[int, int]) -> int:
        number, at = piece
        if whole is not None:
            return _read(files[number], at, memoryview(whole)[starts[number] + at :][:PIECE_BYTES], around_cache)
        with mmap.mmap(-1, PIECE_BYTES) as buffer, memoryview(buffer) as view:
            return _read(files[number], at, view, around_cache)

    start = time.perf_counter()
    whole = mmap.mmap(-1, starts[-1]) if keep else None
    with ThreadPoolExecutor(READERS) as pool:
        read_bytes = sum(pool.map(read, pieces))
    return read_bytes / (time.perf_counter() - start)


def _read(file: Path, at: int, memory: memoryview, around_cache: bool) -> int:
    try:
        fd = os.open(file, os.O_RDONLY | (os.O_DIRECT if around_cache else 0))
    except OSError:  # no such way on this file system
        fd = os.open(file, os.O_RDONLY)
    try:
        return os.preadv(fd, [memory], at)
    finally:
        os.close(fd)
