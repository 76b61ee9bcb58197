"""A checkpoint file while it is read: proven unchanged, from the page cache what is there, the rest around it."""

import ctypes
import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from services.errors import BadCheckpoint, CheckpointChanged
from services.params.layout import PAGE, round_up
from services.params.mapping import address_of, c_library
from services.params.specs import CheckpointFile, FileIdentity

_MOST_PARTS = os.sysconf("SC_IOV_MAX")
_SYS_CACHESTAT = 451  # on every architecture; Linux 6.5


@dataclass(frozen=True, slots=True)
class Target:
    """Where some bytes of a read go."""

    at: int  # in the read
    memory: memoryview


class SourceFile:
    """A checkpoint file open for reading, proven to be the one whose header was read."""

    def __init__(self, file: CheckpointFile, is_buffered: bool) -> None:
        self.path = file.path
        self._identity = file.identity
        self._fd = self._direct = -1
        self._is_buffered = is_buffered

    def __enter__(self) -> "SourceFile":
        try:
            self._open()
            self.check()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for fd in {self._fd, self._direct} - {-1}:
            os.close(fd)

    def check(self) -> None:
        """Raises CheckpointChanged unless the file is in the state in which its header was read."""
        for fd in {self._fd, self._direct}:
            if FileIdentity.of(os.fstat(fd)) != self._identity:
                raise CheckpointChanged(f"{self.path.name} changed while it was read: ask again when it is complete")

    def read(self, offset: int, size_bytes: int, targets: Sequence[Target], staging: memoryview) -> None:
        """Read a range of the file, which the targets share out without gaps, and leave little of it in the page cache.

        staging: page-aligned, for two pages more than the range. Raises BadCheckpoint, CheckpointChanged.
        """
        with self._reading(offset, size_bytes):
            if self._is_at_hand(offset, size_bytes):
                self._read_in_place(offset, [target.memory for target in targets if len(target.memory)])
            else:
                share_out(self._read_around(offset, size_bytes, staging), targets)

    def fetch(self, offset: int, size_bytes: int, staging: memoryview) -> memoryview:
        """As `read`, but the bytes stay in the staging buffer; where they lie there."""
        with self._reading(offset, size_bytes):
            if not self._is_at_hand(offset, size_bytes):
                return self._read_around(offset, size_bytes, staging)
            self._read_in_place(offset, [staging[:size_bytes]])
            return staging[:size_bytes]

    @contextmanager
    def _reading(self, offset: int, size_bytes: int) -> Iterator[None]:
        try:
            yield
            os.posix_fadvise(self._fd, offset, size_bytes, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise self._bad(error) from error

    def _is_at_hand(self, offset: int, size_bytes: int) -> bool:
        """Whether a range is to be read through the page cache."""
        return self._direct == self._fd or _is_cached(self._fd, offset, size_bytes)

    def _read_in_place(self, offset: int, left: list[memoryview]) -> None:
        while left:
            count = self._some(os.preadv(self._fd, left[:_MOST_PARTS], offset))
            offset += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if left:
                left[0] = left[0][count:]

    def _read_around(self, offset: int, size_bytes: int, staging: memoryview) -> memoryview:
        """By whole pages, as O_DIRECT wants it; where the bytes lie in the staging buffer."""
        start, have = offset // PAGE * PAGE, 0
        end = round_up(offset + size_bytes, PAGE)
        while have < offset + size_bytes - start:
            have += self._some(os.preadv(self._direct, [staging[have : end - start]], start + have))
        return staging[offset - start :][:size_bytes]

    def _some(self, count: int) -> int:
        if not count:
            raise CheckpointChanged(f"{self.path.name} became shorter while it was read")
        return count

    def _open(self) -> None:
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            self._direct = self._fd if self._is_buffered else self._open_direct()
        except FileNotFoundError as error:
            raise CheckpointChanged(f"{self.path.name} was removed while it was read") from error
        except OSError as error:
            raise self._bad(error) from error

    def _open_direct(self) -> int:
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return self._fd  # a file system without O_DIRECT

    def _bad(self, error: OSError) -> BadCheckpoint:
        return BadCheckpoint(f"{self.path.name} cannot be read: {os.strerror(error.errno or 0)}")


def share_out(raw: memoryview, targets: Sequence[Target]) -> None:
    """Move a read's bytes to where they belong."""
    source = address_of(raw)
    for target in targets:  # a slice's assignment would keep all other threads waiting
        ctypes.memmove(address_of(target.memory), source + target.at, len(target.memory))


def forget(path: Path) -> None:
    """Leave nothing of a file in the page cache: ranges that were read end within pieces that it drops whole only."""
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _is_cached(fd: int, offset: int, size_bytes: int) -> bool:
    """Whether the page cache has all of a range. False where the kernel does not say."""
    first, last = offset // PAGE, (offset + size_bytes - 1) // PAGE
    asked, answer = (ctypes.c_uint64 * 2)(offset, size_bytes), (ctypes.c_uint64 * 5)()
    failed = c_library().syscall(_SYS_CACHESTAT, fd, asked, answer, 0)
    return not failed and answer[0] >= last - first + 1
