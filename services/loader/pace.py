"""How fast bytes may be read from disk, and that none are any more once the loader stops."""

import threading
import time

from services.params.layout import PAGE

CHUNK_BYTES = 8 << 20


class Pace:
    """A cap on bytes a second, shared by all threads; `stop` wakes whoever waits, and nobody passes after it."""

    def __init__(self, bytes_per_second: int | None) -> None:
        self._rate = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._stopped = threading.Event()

    @property
    def chunk_bytes(self) -> int:
        """Reads of a slow fill are small, so that its rate is even."""
        return min(CHUNK_BYTES, max(PAGE, self._rate // 16)) if self._rate else CHUNK_BYTES

    def take(self, size_bytes: int) -> None:
        """Wait until `size_bytes` may be read. Raises FillStopped."""
        delay = 0.0
        if self._rate:
            with self._lock:
                now = time.monotonic()
                self._free_at = max(self._free_at, now) + size_bytes / self._rate
                delay = self._free_at - now
        if self._stopped.is_set() or (delay and self._stopped.wait(delay)):
            raise FillStopped

    def stop(self) -> None:
        self._stopped.set()


class FillStopped(Exception):  # noqa: N818 - nothing went wrong
    """The loader stops; the extent stays unfinished."""
