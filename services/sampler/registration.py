"""Page-locks arenas for a device, chunk by chunk as their extents become READY."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Protocol

import structlog
import torch

from services.params.arena import AttachedArena
from services.params.layout import extents_in

# The driver locks 10 to 23 GB a second: a chunk takes some 20 ms. Copies are cut where chunks end.
CHUNK_BYTES = 256 << 20
# While it locks, the driver lets no other thread near the device, nor afterwards if the next chunk follows at once.
PAUSE_S = 0.001
POLL_S = 0.05

log = structlog.get_logger()


class Way(Enum):
    """How arena bytes reach the device, best first."""

    READ_ONLY = "registered memory, read-only"
    PROTECTED = "registered memory, protected after registration"
    STAGED = "pinned staging buffers"


class Locker(Protocol):
    """What locks pages: the CUDA driver."""

    def locks_read_only(self, device_index: int) -> bool: ...
    def lock(self, address: int, size_bytes: int, read_only: bool) -> int: ...
    def unlock(self, address: int) -> int: ...


def chunks_of(size_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
    """(offset, size) of the chunks of an arena's data. They begin on pages, so that no page is locked twice."""
    for start in range(0, size_bytes, chunk_bytes):
        yield start, min(chunk_bytes, size_bytes - start)


def limit_of_locking(limit_bytes: int) -> str:
    """What may be behind a refusal, and who can change it; nothing if RLIMIT_MEMLOCK is unlimited."""
    if limit_bytes == resource.RLIM_INFINITY:
        return ""
    return (
        f"; this process may lock {limit_bytes / 2**20:.1f} MiB: raise it (docker run --ulimit memlock=-1, systemd"
        " LimitMEMLOCK=infinity, Kubernetes: the container runtime's default limits)"
    )


class Registration:
    """One arena: what of it is locked, and what is still to be."""

    def __init__(self, arena: AttachedArena, data: torch.Tensor, chunk_bytes: int) -> None:
        self.arena = arena
        self.data = data  # uint8, the whole data
        # Extents that each chunk waits for: looked up once, for it is asked often while the arena is filled.
        self.todo = {chunk: extents_in(arena.extents, *chunk) for chunk in chunks_of(len(data), chunk_bytes)}
        self.since_s = time.monotonic()
        self.locked: list[int] = []  # addresses

    def next_ready(self) -> tuple[int, int] | None:
        """A chunk all of whose extents are READY."""
        return next((chunk for chunk, extents in self.todo.items() if all(map(self.arena.is_ready, extents))), None)


class Registrar:
    """Locks in the background; a copy from a chunk that is not locked yet is right too, only slower.

    Ways are tried from the best one on; the first that the device takes is kept for all arenas. Without any, copies
    have to be staged.
    """

    def __init__(
        self, device: torch.device, locker: Locker, best: Way = Way.READ_ONLY, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self.way = best
        self.locked_bytes = 0
        self._device = device
        self._locker = locker
        self._chunk_bytes = chunk_bytes
        self._mutex = threading.Lock()
        self._arenas: dict[AttachedArena, Registration] = {}
        self._more = threading.Event()
        if best is Way.READ_ONLY and not locker.locks_read_only(device.index or 0):
            self._fall_back("the device does not lock read-only memory")
        threading.Thread(target=self._run, name="registrar", daemon=True).start()

    def add(self, arena: AttachedArena, data: torch.Tensor) -> None:
        with self._mutex:
            if arena not in self._arenas:
                self._arenas[arena] = Registration(arena, data, self._chunk_bytes)
        self._more.set()

    def remove(self, arena: AttachedArena) -> None:
        """Unlock; the caller has seen to it that no copy is under way."""
        with self._mutex:
            gone = self._arenas.pop(arena, None)
            for address in gone.locked if gone else ():
                self._locker.unlock(address)

    def is_done(self) -> bool:
        """Whether nothing is left to lock."""
        with self._mutex:
            return self.way is Way.STAGED or not any(r.todo for r in self._arenas.values())

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while self._more.wait():
            self._more.clear()
            while not self.is_done():
                # The longer pause: what is left is not READY yet.
                time.sleep(PAUSE_S if self._lock_one() else POLL_S)

    def _lock_one(self) -> bool:
        """Lock one chunk whose extents are READY; False if there is none."""
        with self._mutex:
            for registration in self._arenas.values():
                chunk = registration.next_ready()
                if chunk is not None and self.way is not Way.STAGED:
                    self._lock(registration, *chunk)
                    return True
        return False

    def _lock(self, registration: Registration, start: int, size: int) -> None:
        address = registration.data.data_ptr() + start
        error = self._lock_ways()[self.way](registration.arena, address, start, size)
        if error:
            limit_bytes, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
            self._fall_back(f"refused with CUDA error {error}{limit_of_locking(limit_bytes)}")
            return
        del registration.todo[start, size]
        registration.locked.append(address)
        self.locked_bytes += size
        if not registration.todo:
            seconds = round(time.monotonic() - registration.since_s, 3)
            log.info("page-locked", size_bytes=len(registration.data), seconds=seconds, way=self.way.value)

    def _lock_ways(self) -> dict[Way, Callable[[AttachedArena, int, int, int], int]]:
        return {Way.READ_ONLY: self._lock_read_only, Way.PROTECTED: self._lock_protected}

    def _lock_read_only(self, arena: AttachedArena, address: int, start: int, size: int) -> int:
        return self._locker.lock(address, size, read_only=True)

    def _lock_protected(self, arena: AttachedArena, address: int, start: int, size: int) -> int:
        try:
            with arena.writable(address, start, size):
                return self._locker.lock(address, size, read_only=False)
        except PermissionError as error:
            return error.errno or 1

    def _fall_back(self, reason: str) -> None:
        ways = list(Way)
        refused, self.way = self.way, ways[ways.index(self.way) + 1]
        log.warning("page-locking", refused=refused.value, reason=reason, way=self.way.value)
