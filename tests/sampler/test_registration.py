"""What is page-locked when, with a locker that keeps a book instead of a CUDA driver."""

from __future__ import annotations

import itertools
import resource
import time
from collections.abc import Callable
from typing import Any

import pytest
import structlog
import torch

from services.params.layout import Extent
from services.sampler.registration import Registrar, Way, chunks_of, limit_of_locking

PAGE = 4096


class Book:
    """Locks nothing, refuses what it is told to, and fails where a driver would: pages that are locked already."""

    def __init__(self, read_only: bool = True, refuses: tuple[bool, ...] = ()) -> None:
        self.read_only = read_only
        self.refuses = refuses  # values of `read_only` that are refused
        self.locked: dict[int, int] = {}
        self.overlaps = 0

    def locks_read_only(self, device_index: int) -> bool:
        return self.read_only

    def lock(self, address: int, size_bytes: int, read_only: bool) -> int:
        if read_only in self.refuses:
            return 801
        pages = range(address // PAGE, -(-(address + size_bytes) // PAGE))
        held = itertools.chain(*(range(a // PAGE, -(-(a + s) // PAGE)) for a, s in self.locked.items()))
        self.overlaps += bool(set(pages) & set(held))
        self.locked[address] = size_bytes
        return 0

    def unlock(self, address: int) -> int:
        del self.locked[address]
        return 0


class Arena:
    """Ten extents of 3,000 bytes, which end within pages, READY as a test says."""

    def __init__(self) -> None:
        self.data = torch.zeros(30_000 + PAGE, dtype=torch.uint8)
        self.data = self.data[-self.data.data_ptr() % PAGE :][:30_000]
        self.extents = tuple(Extent(n * 3000, 3000) for n in range(10))
        self.ready = set(range(10))
        self.asked_count = 0

    def is_ready(self, extent: int) -> bool:
        self.asked_count += 1
        return extent in self.ready

    def writable(self, address: int, offset: int, size_bytes: int) -> Any:
        raise PermissionError(13, "not yours")


def registrar(book: Book, best: Way = Way.READ_ONLY) -> Registrar:
    return Registrar(torch.device("cpu"), book, best, chunk_bytes=2 * PAGE)


def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that")


def test_every_byte_is_locked_once() -> None:
    """Chunks are whole pages: no page is locked twice, though extents end within pages."""
    book, arena = Book(), Arena()
    made = registrar(book)
    made.add(arena, arena.data)  # type: ignore[arg-type] # stands for an AttachedArena
    until(made.is_done)

    assert book.overlaps == 0
    assert sum(book.locked.values()) == made.locked_bytes == 30_000
    assert made.way is Way.READ_ONLY


def test_a_chunk_waits_for_its_extents() -> None:
    """What is not READY is not locked, what is around it is; then it follows."""
    book, arena = Book(), Arena()
    arena.ready.discard(4)  # bytes 12,000 to 15,000: the second of four chunks
    made = registrar(book)
    made.add(arena, arena.data)  # type: ignore[arg-type]
    until(lambda: len(book.locked) == 3)
    assert not made.is_done()
    arena.ready.add(4)
    until(made.is_done)

    assert len(book.locked) == 4


def test_waiting_for_extents_leaves_the_interpreter_to_others() -> None:
    """A second arena comes while the first is waited for: then too it looks now and then, not all the time."""
    arenas = Arena(), Arena()
    made = registrar(Book())
    for arena in arenas:
        arena.ready.clear()
        made.add(arena, arena.data)  # type: ignore[arg-type]
        until(lambda: arena.asked_count > 0)  # noqa: B023
    asked = [arena.asked_count for arena in arenas]
    time.sleep(0.3)

    assert all(arena.asked_count - before < 1000 for arena, before in zip(arenas, asked, strict=True))


def test_removing_unlocks() -> None:
    """An arena that goes leaves nothing locked."""
    book, arena = Book(), Arena()
    made = registrar(book)
    made.add(arena, arena.data)  # type: ignore[arg-type]
    until(made.is_done)
    made.remove(arena)  # type: ignore[arg-type]

    assert book.locked == {}


@pytest.mark.parametrize("book", [Book(read_only=False), Book(refuses=(True, False))])
def test_without_a_way_copies_are_staged(book: Book) -> None:
    """Neither read-only memory nor a writable mapping: nothing is locked, and the way says so."""
    arena = Arena()
    made = registrar(book)
    made.add(arena, arena.data)  # type: ignore[arg-type]
    until(made.is_done)

    assert made.way is Way.STAGED
    assert book.locked == {}


def test_a_refusal_names_the_limit_of_locked_memory() -> None:
    """With its settings; not where there is none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, hard))
    try:
        with structlog.testing.capture_logs() as lines:
            arena, made = Arena(), registrar(Book(refuses=(True, False)))
            made.add(arena, arena.data)  # type: ignore[arg-type]
            until(made.is_done)
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
    reason = lines[0]["reason"]

    assert reason.startswith("refused with CUDA error 801; this process may lock 0.1 MiB: ")
    assert all(setting in reason for setting in ("memlock=-1", "LimitMEMLOCK=infinity", "container runtime"))
    assert limit_of_locking(resource.RLIM_INFINITY) == ""


def test_chunks_are_the_whole() -> None:
    """They follow each other without a gap."""
    assert list(chunks_of(10_000, 4096)) == [(0, 4096), (4096, 4096), (8192, 1808)]
