"""An arena as the loader has it: made, filled, published, adopted and removed. Knows no checkpoint, no grpc."""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from services.errors import BadArena, HostMemoryFull
from services.params.arena import ExtentState, opened, read_front
from services.params.header import DIGEST_BYTES, Header, Regions
from services.params.layout import PAGE, round_up
from services.params.mapping import address_of, populate
from services.params.placement import Placement

_RESERVE_BYTES = 64 << 20  # in one call; a signal waits for its end
_POPULATE_BYTES = 8 << 20  # in one call; threads that map or unmap wait for its end, some 4 ms


class OwnedArena:
    """The loader's side of an arena. Mapped only where it is being filled: mapped memory makes a process look large.

    Nothing is written to an extent that is READY. Closing keeps the file, `unlink` ends it.
    """

    def __init__(self, path: Path, fd: int, header: Header, regions: Regions) -> None:
        self.path = path
        self.header = header
        self.file_bytes = regions.file_bytes
        self._fd = fd
        self._regions = regions

    @classmethod
    def create(cls, path: Path, header: Header, placement: Placement | None = None) -> "OwnedArena":
        """A new file, which is no arena before `reserve`. Raises HostMemoryFull, with nothing left behind.

        Without a placement each page is on the node of the thread that makes it.
        """
        front, regions = header.pack()
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        try:
            _check_room(fd, regions.file_bytes)
            with _allocating():
                os.ftruncate(fd, regions.file_bytes)
                if placement:
                    placement.apply(fd, regions.file_bytes)
                os.pwrite(fd, front[PAGE:], PAGE)
        except BaseException:
            os.close(fd)
            path.unlink()
            raise
        return cls(path, fd, header, regions)

    def reserve(self) -> None:
        """Have memory for all of it, so that a full tmpfs is an error here; then the file is an arena.

        Extents may be filled meanwhile. Raises HostMemoryFull; the file is for the caller to unlink.
        """
        size = self._regions.file_bytes
        with _allocating():
            for start in range(0, size, _RESERVE_BYTES):
                os.posix_fallocate(self._fd, start, min(_RESERVE_BYTES, size - start))
            os.pwrite(self._fd, self.header.pack()[0][:PAGE], 0)

    @classmethod
    def open(cls, path: Path) -> "OwnedArena":
        """A dead owner's file, as it was left; `adopt` makes it ours. Raises BadArena, or LoaderGone if it is gone."""
        with opened(path, os.O_RDWR) as fd:
            header, regions = read_front(fd)
            if os.fstat(fd).st_blocks * 512 < regions.file_bytes:
                raise BadArena("an arena that is not backed by memory")
            return cls(path, fd, header, regions)

    def adopt(self) -> None:
        """What the dead owner was filling becomes ABSENT; what it called READY becomes VERIFYING until `confirm`."""
        kept = (ExtentState.READY, ExtentState.VERIFYING)
        for extent, state in enumerate(self.states()):
            self._set_state(extent, ExtentState.VERIFYING if state in kept else ExtentState.ABSENT)

    @property
    def user_id(self) -> int:
        """Whose file it is: in a folder that others may write to, it need not be a loader's."""
        return os.fstat(self._fd).st_uid

    def states(self) -> list[ExtentState]:
        count = len(self.header.layout.extents)
        return [ExtentState(state) for state in os.pread(self._fd, count, self._regions.states)]

    def mark(self, extent: int, state: ExtentState) -> None:
        """Set a state byte; READY is set by `publish` and `confirm` alone."""
        assert state is not ExtentState.READY
        self._set_state(extent, state)

    @contextmanager
    def window(self, extent: int, is_backed: bool = True) -> Iterator[memoryview]:
        """An extent's memory, mapped inside the block: to write to, or to digest. Raises HostMemoryFull.

        Without `is_backed` no part of it may be touched before `back` was called for it.
        """
        place = self.header.layout.extents[extent]
        with self._mapped(self._regions.data + place.offset, place.size_bytes) as memory:
            if is_backed:
                self.back(extent, memory, 0, place.size_bytes)
            yield memory

    def back(self, extent: int, memory: memoryview, start: int, end: int) -> None:
        """Have memory behind the bytes from `start` to `end` of an extent's window. Raises HostMemoryFull."""
        place = self.header.layout.extents[extent]
        with _allocating():
            for step in range(start // PAGE * PAGE, end, _POPULATE_BYTES):
                count = min(_POPULATE_BYTES, round_up(end, PAGE) - step)
                if not populate(address_of(memory) + step, count):
                    os.posix_fallocate(self._fd, self._regions.data + place.offset + step, count)

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

    @contextmanager
    def _mapped(self, start: int, size_bytes: int) -> Iterator[memoryview]:
        """Bytes of the file from a page on."""
        mapped = mmap.mmap(self._fd, size_bytes, offset=start)
        mapped.madvise(mmap.MADV_DONTDUMP)
        try:
            with memoryview(mapped) as memory:
                yield memory
        finally:
            with suppress(BufferError):  # an exception's frames have views: it is unmapped with them
                mapped.close()

    def _set_state(self, extent: int, state: ExtentState) -> None:
        os.pwrite(self._fd, bytes((state,)), self._regions.states + extent)


def _check_room(fd: int, size: int) -> None:
    room = os.fstatvfs(fd)
    have = room.f_bavail * room.f_frsize
    if room.f_blocks and size > have:  # a tmpfs without a size counts no blocks
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
