"""Arenas as files in shared memory: attached read-only by samplers, owned by the loader.

The only file that opens shared memory. Leases are `flock`s of the kernel: a sampler holds LOCK_SH on what it maps,
and LOCK_EX, which the owner takes before it unlinks, can only be had when nobody does. Knows no checkpoint, no grpc.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Self

from services.errors import BadArena, HostMemoryFull, LoaderGone
from services.params.header import DIGEST_BYTES, Header, Regions, parse, parse_page
from services.params.layout import PAGE, Extent, PlacedTensor

# Nobody writes to the file during one step: some 4 ms.
_RESERVE_STEP_BYTES = 16 << 20
_MAP_FIXED = 0x10  # Python's mmap has no name for it


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
            _map_over(address, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE, fd, self._data_at + offset)
        finally:
            os.close(fd)
        try:
            yield
        finally:
            _protect(address, size_bytes, mmap.PROT_READ)

    def close(self) -> None:
        """Give the lease back and unmap; may be called again. Memory that views still hold is unmapped with them."""
        if self._fd < 0:
            return
        # The mapping holds a duplicate of the descriptor: closing ours would not drop the lock.
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        os.close(self._fd)
        self._fd = -1
        for view in (self._states, self.data):
            with suppress(BufferError):
                view.release()
        with suppress(BufferError):
            self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def attach(path: Path, generation: str) -> AttachedArena:
    """Map and lease the arena at `path`, which must be of `generation`.

    Raises LoaderGone when the file is no more, BadArena when it is not what it should be.
    """
    with _opened(path, os.O_RDONLY) as fd:
        fcntl.flock(fd, fcntl.LOCK_SH)  # waits only while the owner unlinks
        _check_linked(path, fd)
        header, regions = _read_front(fd)
        if header.generation != generation:
            raise BadArena(f"arena of generation {header.generation[:8]}, {generation[:8]} was expected")
        return AttachedArena(fd, header, regions)


def discard(path: Path) -> bool:
    """Remove an arena file that nobody leases, damaged ones too; False if a sampler maps it."""
    with suppress(LoaderGone, BlockingIOError), _opened(path, os.O_RDONLY) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        os.close(fd)
    return not path.exists()


class OwnedArena:
    """The loader's side of an arena: written through a descriptor, never mapped.

    Nothing is written to an extent that is READY. Closing keeps the file, `unlink` ends it.
    """

    def __init__(self, path: Path, fd: int, header: Header, regions: Regions) -> None:
        self.path = path
        self.header = header
        self.file_bytes = regions.file_bytes
        self._fd = fd
        self._regions = regions
        # The kernel lets one thread write to a file at a time, and others spin while they wait for it.
        self._writing = threading.Lock()

    @classmethod
    def create(cls, path: Path, header: Header) -> "OwnedArena":
        """A new file, which is no arena before `reserve`. Raises HostMemoryFull, with nothing left behind."""
        front, regions = header.pack()
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        try:
            _check_room(fd, regions.file_bytes)
            with _allocating():
                os.pwrite(fd, front[PAGE:], PAGE)
        except BaseException:
            os.close(fd)
            path.unlink()
            raise
        return cls(path, fd, header, regions)

    def reserve(self) -> None:
        """Allocate every page, so that a full tmpfs is an error here; then the file is an arena.

        Extents may be filled meanwhile. Raises HostMemoryFull; the file is for the caller to unlink.
        """
        size = self._regions.file_bytes
        with _allocating():
            for start in range(0, size, _RESERVE_STEP_BYTES):
                with self._writing:
                    os.posix_fallocate(self._fd, start, min(_RESERVE_STEP_BYTES, size - start))
            os.pwrite(self._fd, self.header.pack()[0][:PAGE], 0)

    @classmethod
    def open(cls, path: Path) -> "OwnedArena":
        """A dead owner's file, as it was left; `adopt` makes it ours. Raises BadArena, or LoaderGone if it is gone."""
        with _opened(path, os.O_RDWR) as fd:
            header, regions = _read_front(fd)
            if os.fstat(fd).st_blocks * 512 < regions.file_bytes:
                raise BadArena("an arena that is not backed by memory")
            return cls(path, fd, header, regions)

    def adopt(self) -> None:
        """What the dead owner was filling becomes ABSENT; what it called READY becomes VERIFYING until `confirm`."""
        kept = (ExtentState.READY, ExtentState.VERIFYING)
        for extent, state in enumerate(self.states()):
            self._set_state(extent, ExtentState.VERIFYING if state in kept else ExtentState.ABSENT)

    def states(self) -> list[ExtentState]:
        count = len(self.header.layout.extents)
        return [ExtentState(state) for state in os.pread(self._fd, count, self._regions.states)]

    def mark(self, extent: int, state: ExtentState) -> None:
        """Set a state byte; READY is set by `publish` and `confirm` alone."""
        assert state is not ExtentState.READY
        self._set_state(extent, state)

    def write(self, offset: int, data: memoryview) -> None:
        """Write at `offset` of the data; releases the GIL. Raises HostMemoryFull where nothing is reserved yet."""
        with _allocating(), self._writing:
            while data:
                count = os.pwrite(self._fd, data, self._regions.data + offset)
                data, offset = data[count:], offset + count

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read the data at `offset`; releases the GIL."""
        if os.preadv(self._fd, [buffer], self._regions.data + offset) != len(buffer):
            raise BadArena("an arena that is shorter than its header says")

    def publish(self, extent: int, digest: bytes) -> None:
        """Declare an extent's data complete: the digest is stored, then the state byte."""
        os.pwrite(self._fd, digest, self._regions.digests + extent * DIGEST_BYTES)
        self._set_state(extent, ExtentState.READY)

    def confirm(self, extent: int) -> None:
        """Declare an adopted extent READY again: its data has the digest that it was published with."""
        self._set_state(extent, ExtentState.READY)

    def digest(self, extent: int) -> bytes:
        return os.pread(self._fd, DIGEST_BYTES, self._regions.digests + extent * DIGEST_BYTES)

    def is_leased(self) -> bool:
        """Whether a sampler maps the arena."""
        if not self.lock():
            return True
        self.unlock()
        return False

    def lock(self) -> bool:
        """Keep samplers from attaching until `unlock` or `close`; False if one has."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def unlock(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def unlink(self, even_if_leased: bool = False) -> bool:
        """Remove the file's name; False, with nothing done, if it is leased. The memory goes with `close`.

        With `even_if_leased` it goes when the last sampler has unmapped it.
        """
        if not self.lock() and not even_if_leased:
            return False
        self.path.unlink(missing_ok=True)
        return True

    def close(self) -> None:
        """Close the descriptor; no thread may be writing. May be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _set_state(self, extent: int, state: ExtentState) -> None:
        os.pwrite(self._fd, bytes((state,)), self._regions.states + extent)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
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


def _read_front(fd: int) -> tuple[Header, Regions]:
    regions, _, _ = parse_page(os.pread(fd, PAGE, 0))
    if os.fstat(fd).st_size != regions.file_bytes:
        raise BadArena("an arena that is not as long as its header says")
    return parse(os.pread(fd, regions.data, 0))


def _map_over(address: int, size_bytes: int, protection: int, fd: int, offset: int) -> None:
    """Map the file at `offset` in the place of what is mapped at `address`: the same bytes, with other rights."""
    call = _c_library().mmap
    call.restype = ctypes.c_void_p
    number = ctypes.c_long
    mapped = call(
        ctypes.c_void_p(address),
        ctypes.c_size_t(size_bytes),
        protection,
        mmap.MAP_SHARED | _MAP_FIXED,
        fd,
        number(offset),
    )
    if mapped != address:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    _c_library().madvise(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), mmap.MADV_DONTDUMP)


def _protect(address: int, size_bytes: int, protection: int) -> None:
    if _c_library().mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), protection):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check_room(fd: int, size: int) -> None:
    room = os.fstatvfs(fd)
    have = room.f_bavail * room.f_frsize
    if size > have:
        raise HostMemoryFull(
            f"the arena directory has no room: {size / 2**20:.1f} MiB needed, {have / 2**20:.1f} MiB free"
        )


@contextmanager
def _allocating() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
            raise HostMemoryFull(f"the arena directory has no room: {os.strerror(error.errno)}") from error
        raise
