"""Arenas as files in shared memory, attached read-only by samplers; `owned_arena.py` is the loader's side.

The only two files that open shared memory. Leases are `flock`s of the kernel: a sampler holds LOCK_SH on what it maps,
and LOCK_EX, which the owner takes before it unlinks, can only be had when nobody does. Knows no checkpoint, no grpc.
"""

import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Self

from services.errors import BadArena, LoaderGone
from services.params.header import Header, Regions, parse, parse_page
from services.params.layout import PAGE, Extent, PlacedTensor
from services.params.mapping import map_over, protect


class ExtentState(IntEnum):
    """State byte of an extent; only READY bytes may be read."""

    ABSENT = 0
    FILLING = 1
    VERIFYING = 2
    READY = 3
    FAILED = 4


class AttachedArena:
    """A component's params, mapped read-only and leased until `close`.

    `data` starts on a page. Views made of it (tensors) keep the mapping alive after `close`, the lease does not last.
    """

    def __init__(self, fd: int, header: Header, regions: Regions) -> None:
        self._fd = fd
        self._data_at = regions.data  # in the file
        self.component = header.component
        self.generation = header.generation
        self.identity = header.identity
        self.tensors: tuple[PlacedTensor, ...] = header.layout.tensors
        self.extents: tuple[Extent, ...] = header.layout.extents
        self.size_bytes = header.layout.data_bytes
        self._map = mmap.mmap(fd, regions.file_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        self._map.madvise(mmap.MADV_DONTDUMP)
        whole = memoryview(self._map)
        self.data = whole[regions.data :]
        self._states = whole[regions.states : regions.states + len(self.extents)]

    def state(self, extent: int) -> ExtentState:
        return ExtentState(self._states[extent])

    def is_ready(self, extent: int) -> bool:
        """Whether the extent's bytes may be read; costs one read of a byte."""
        return self._states[extent] == 3

    @property
    def ready_bytes(self) -> int:
        return sum(self.extents[n].size_bytes for n, state in enumerate(bytes(self._states)) if state == 3)

    @contextmanager
    def writable(self, address: int, offset: int, size_bytes: int) -> Iterator[None]:
        """Pages of the data may be written inside the block, for devices that page-lock writable memory only.

        address: where the data's byte `offset`, the first of a page, is mapped. Raises PermissionError if the file may
        not be written.
        """
        fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            map_over(address, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE, fd, self._data_at + offset)
        finally:
            os.close(fd)
        try:
            yield
        finally:
            protect(address, size_bytes, mmap.PROT_READ)

    def close(self) -> None:
        """Give the lease back and unmap; may be called again. Memory that views still hold is unmapped with them."""
        if self._fd < 0:
            return
        # The mapping holds a duplicate of the descriptor: closing ours would not drop the lock.
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        os.close(self._fd)
        self._fd = -1
        # Nothing is released: a tensor holds the memoryview and not its buffer, and would be left pointing nowhere.
        self.data = self._states = memoryview(b"")
        del self._map

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def attach(path: Path, generation: str) -> AttachedArena:
    """Map and lease the arena at `path`, which must be of `generation`.

    Raises LoaderGone when the file is no more, BadArena when it is not what it should be.
    """
    with opened(path, os.O_RDONLY) as fd:
        fcntl.flock(fd, fcntl.LOCK_SH)  # waits only while the owner unlinks
        _check_linked(path, fd)
        header, regions = read_front(fd)
        if header.generation != generation:
            raise BadArena(f"arena of generation {header.generation[:8]}, {generation[:8]} was expected")
        return AttachedArena(fd, header, regions)


def discard(path: Path) -> bool:
    """Remove an arena file that nobody leases, damaged ones too; False if a sampler maps it."""
    with suppress(LoaderGone, BlockingIOError), opened(path, os.O_RDONLY) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        os.close(fd)
    return not path.exists()


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """An open descriptor that the block takes over, closed if the block fails."""
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError as error:
        raise LoaderGone("the arena is no more: the loader gave it up, ask it again") from error
    except OSError as error:
        raise BadArena(f"an arena that cannot be opened: {os.strerror(error.errno or 0)}") from error
    try:
        yield fd
    except BaseException:
        os.close(fd)
        raise


def _check_linked(path: Path, fd: int) -> None:
    try:
        linked = path.lstat()
    except FileNotFoundError:
        linked = None
    if linked is None or not os.path.samestat(linked, os.fstat(fd)):
        raise LoaderGone("the arena was given up while it was opened: ask the loader again")


def read_front(fd: int) -> tuple[Header, Regions]:
    regions, _, _ = parse_page(os.pread(fd, PAGE, 0))
    if os.fstat(fd).st_size != regions.file_bytes:
        raise BadArena("an arena that is not as long as its header says")
    return parse(os.pread(fd, regions.data, 0))
