"""A checkpoint file while it is read: proven unchanged, page-aligned reads around the page cache."""

import errno
import os

from services.errors import BadCheckpoint, CheckpointChanged
from services.params.layout import PAGE, round_up
from services.params.specs import CheckpointFile, FileIdentity


class SourceFile:
    """A checkpoint file open for reading, proven to be the one whose header was read."""

    def __init__(self, file: CheckpointFile, is_buffered: bool) -> None:
        self._file = file
        self._is_buffered = is_buffered

    def __enter__(self) -> "SourceFile":
        try:
            self._fd = self._open()
        except FileNotFoundError as error:
            raise CheckpointChanged(f"{self._file.path.name} was removed while it was read") from error
        except OSError as error:
            raise self._bad(error) from error
        try:
            self.check()
        except CheckpointChanged:
            os.close(self._fd)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._fd)

    def check(self) -> None:
        """Raises CheckpointChanged unless the file is in the state in which its header was read."""
        if FileIdentity.of(os.fstat(self._fd)) != self._file.identity:
            raise CheckpointChanged(f"{self._file.path.name} changed while it was read: ask again when it is complete")

    def read(self, staging: memoryview, offset: int, size_bytes: int) -> memoryview:
        """Bytes of the file, in `staging`; the read is widened to whole pages."""
        start = offset // PAGE * PAGE
        end = round_up(offset + size_bytes, PAGE)
        have = 0
        while have < offset + size_bytes - start:
            try:
                count = os.preadv(self._fd, [staging[have : end - start]], start + have)
            except OSError as error:
                raise self._bad(error) from error
            if not count:
                raise CheckpointChanged(f"{self._file.path.name} became shorter while it was read")
            have += count
        if self._is_buffered:
            os.posix_fadvise(self._fd, start, end - start, os.POSIX_FADV_DONTNEED)
        return staging[offset - start : offset - start + size_bytes]

    def _open(self) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC
        if not self._is_buffered:
            try:
                return os.open(self._file.path, flags | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._is_buffered = True  # a file system without O_DIRECT
        return os.open(self._file.path, flags)

    def _bad(self, error: OSError) -> BadCheckpoint:
        return BadCheckpoint(f"{self._file.path.name} cannot be read: {os.strerror(error.errno or 0)}")
