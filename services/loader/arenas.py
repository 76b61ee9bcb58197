"""The loader's folder in shared memory: its owner's lock, the arenas and the config folders in it.

A folder has one loader at a time: LOCK_EX on `loader.lock`, which the kernel drops when the process dies.
"""

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import structlog

from services.errors import BadCheckpoint, HeadwaterError, HostMemoryFull
from services.loader import cgroup
from services.loader.catalog import ComponentSource, ModelSource
from services.loader.entries import ConfigError
from services.loader.gguf_tokenizer import tokenizer_files
from services.loader.mounts import mount_of
from services.loader.ownership import check_own, missing_rights
from services.params.arena import discard
from services.params.header import Header
from services.params.owned_arena import OwnedArena
from services.params.placement import Placement

LOCK_NAME = "loader.lock"
SOCKET_NAME = ".loader.sock"
_MADE = b"a loader made this folder\n"
ARENA_SUFFIX = ".arena"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
_CONFIG_PREFIX = "config-"

_log = structlog.get_logger()


class ArenaDir:
    """A locked arena folder; use `open`, and `close` when the loader stops for good."""

    def __init__(self, path: Path, lock: int, is_ours: bool, placement: Placement | None) -> None:
        self.path = path
        self._placement = placement
        self._lock = lock
        self._is_ours = is_ours
        self._stale: list[Path] = []
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")

    @classmethod
    def open(cls, path: Path, allow_disk: bool = False, placement: Placement | None = None) -> "ArenaDir":
        """Create (0700) if need be, and lock. Raises ConfigError: not a tmpfs, not writable, another loader.

        placement: of new arenas; those that are adopted keep theirs.
        """
        try:
            is_ours = not path.exists()
            kind = mount_of(path.parent if is_ours else path).kind
            if kind != "tmpfs" and not allow_disk:
                raise ConfigError(f"{path} is on {kind}, not on a tmpfs: choose another --arena-dir or --allow-disk")
            path.mkdir(mode=0o700, exist_ok=True)
            check_own(path)
            _check_is_own(path)
            lock = _lock(path / LOCK_NAME)
            return cls(path, lock, _note_maker(lock, is_ours), placement)
        except OSError as error:
            raise ConfigError(f"cannot use the arena folder {path}: {error.strerror}{missing_rights(error)}") from error

    @property
    def socket(self) -> Path:
        """Where the loader's server listens behind its door: nobody else may enter this folder."""
        return self.path / SOCKET_NAME

    def free_bytes(self) -> int:
        """What new arenas can have."""
        return min(self.rooms().values())

    def rooms(self) -> dict[str, int]:
        """What new arenas can have, bytes, by what sets the limit: what an operator would enlarge."""
        room = os.statvfs(self.path)
        free_bytes = room.f_bavail * room.f_frsize if room.f_blocks else cgroup.UNLIMITED  # a tmpfs without a size
        return {
            "the size of the loader's tmpfs": free_bytes,
            "the host's memory": _available_bytes(),
            "the memory limit of the loader's container or cgroup": cgroup.free_bytes(cgroup.memory_groups()),
        }

    def arena_bytes(self, sources: Iterable[ComponentSource]) -> int:
        """Size of the arenas of all of `sources`; those that are the same share one."""
        distinct = {source.identity: source for source in sources}
        return sum(self.header(source).file_bytes for source in distinct.values())

    def header(self, source: ComponentSource) -> Header:
        """The header of a new generation of a component."""
        return Header(source.name, secrets.token_hex(16), self._boot_id, source.identity, source.layout)

    def create(self, header: Header) -> OwnedArena:
        """Begin a new arena. Raises HostMemoryFull, with nothing left behind."""
        path = self.path / f"{header.component}-{header.generation}{ARENA_SUFFIX}"
        return OwnedArena.create(path, header, self._placement)

    def adopt(self, sources: Iterable[ComponentSource]) -> dict[str, OwnedArena]:
        """Arenas of a dead loader that hold what a source says, by identity; all others are removed.

        One that a sampler still maps cannot be removed: it stays, is reported, and goes with `remove_stale`.
        """
        known = {source.identity: source for source in sources}
        adopted: dict[str, OwnedArena] = {}
        for path in sorted(self.path.glob(f"*{ARENA_SUFFIX}")):
            arena = self._open_wanted(path, known)
            if arena and arena.header.identity not in adopted:
                arena.adopt()
                adopted[arena.header.identity] = arena
                continue
            if arena:
                arena.close()
            if not discard(path):
                _log.warning("an old arena stays: a sampler maps it", arena=path.name)
                self._stale.append(path)
        return adopted

    def remove_stale(self) -> None:
        """Remove old arenas that `adopt` had to leave and that no sampler maps any more."""
        for path in self._stale:
            if discard(path):
                _log.info("an old arena was removed", arena=path.name)
        self._stale = [path for path in self._stale if path.exists()]

    def clear(self) -> tuple[int, list[str]]:
        """Remove all arenas that no sampler maps; (bytes given back, names of those that stay)."""
        freed_bytes, kept = 0, []
        for path in sorted(self.path.glob(f"*{ARENA_SUFFIX}")):
            size_bytes = path.stat().st_blocks * 512
            if discard(path):
                freed_bytes += size_bytes
            else:
                kept.append(path.name)
        return freed_bytes, kept

    def _open_wanted(self, path: Path, known: dict[str, ComponentSource]) -> OwnedArena | None:
        try:
            arena = OwnedArena.open(path)
        except HeadwaterError as error:
            _log.warning("not an arena of this version", arena=path.name, reason=str(error))
            return None
        source = known.get(arena.header.identity)
        if arena.user_id != os.geteuid():
            _log.warning("an arena of another user is not believed", arena=path.name, user_id=arena.user_id)
        elif source and arena.header.boot_id == self._boot_id and arena.header.layout == source.layout:
            return arena
        arena.close()
        return None

    def publish_config(self, name: str, source: ModelSource) -> str:
        """Copy a model's small files into a folder and return its base name; the folder appears whole or not at all."""
        folder = self.path / f"{_CONFIG_PREFIX}{name}-{source.small_digest}"
        if folder.is_dir():
            return folder.name
        scratch = self.path / f".{folder.name}"
        try:
            for inside, path in source.small_files:
                _copy(path, scratch / inside)
            for inside, path in source.tokenizers:
                for file, content in tokenizer_files(path).items():
                    _write(content, scratch / inside / file)
            scratch.rename(folder)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            # A copy that fails for want of room names the file that it read.
            if error.errno in FULL or str(error.filename).startswith(str(self.path)):
                raise HostMemoryFull(f"the arena directory: {os.strerror(error.errno or 0)}") from error
            raise BadCheckpoint(f"a file of the model cannot be read: {os.strerror(error.errno or 0)}") from error
        return folder.name

    def remove_config(self, name: str) -> None:
        shutil.rmtree(self.path / name, ignore_errors=True)

    def remove_configs_except(self, names: set[str]) -> None:
        """Remove config folders of models that are not resident, and half-copied ones."""
        for pattern in (f"{_CONFIG_PREFIX}*", f".{_CONFIG_PREFIX}*"):
            for folder in self.path.glob(pattern):
                if folder.name not in names:
                    shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Remove the config folders and, if no arena stays, the lock; the folder too, if a loader made it."""
        self.remove_configs_except(set())
        self.socket.unlink(missing_ok=True)
        if not any(self.path.glob(f"*{ARENA_SUFFIX}")):  # else the lock says whose they are
            (self.path / LOCK_NAME).unlink(missing_ok=True)
        os.close(self._lock)
        if self._is_ours:
            with suppress(OSError):
                self.path.rmdir()


def _check_is_own(path: Path) -> None:
    """A folder that a loader cleans up must hold nothing but what loaders (and samplers' sockets) put there."""
    names = {inside.name for inside in path.iterdir() if not inside.is_socket()}
    if names and LOCK_NAME not in names:
        raise ConfigError(f"{path} holds other files: give the loader a folder of its own")


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 1 << 62


def _note_maker(lock: int, is_ours: bool) -> bool:
    """Whether a loader made the folder, this one or a dead one before it; the lock file remembers."""
    if is_ours:
        os.pwrite(lock, _MADE, 0)
    return os.pread(lock, len(_MADE), 0) == _MADE


def _lock(path: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise ConfigError(f"another loader owns {path.parent}") from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        os.close(fd)  # the last owner removed this very file while we opened it


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    shutil.copyfile(path, target)
    target.chmod(0o640)


def _write(content: bytes, target: Path) -> None:
    target.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    target.write_bytes(content)
    target.chmod(0o640)
