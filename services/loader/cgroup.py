"""What the loader's cgroup lets it have of memory. Pages of a tmpfs count for the cgroup that first touches them: ours.

A container sees its own cgroup at the root of the mount, while /proc may tell the host's path: what is not there of the
path is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """One cgroup, in bytes. `cache_bytes` is the page cache that the kernel drops before it kills anybody."""

    limit_bytes: int = UNLIMITED
    used_bytes: int = 0
    cache_bytes: int = 0
    swap_bytes: int = UNLIMITED  # most of it that may be in swap

    @property
    def free_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes + self.cache_bytes)


@dataclass(frozen=True, slots=True)
class _Version:
    """Names of a cgroup version's files, and of its counts of page cache in memory.stat.

    Pages of a tmpfs are on the lists of anonymous memory: the counts of file pages are of files on disk alone. `dirty`
    ones have to be written first.
    """

    limit: str
    used: str
    swap: str
    cached: tuple[str, ...]
    dirty: tuple[str, ...]


_V1 = _Version(
    "memory.limit_in_bytes", "memory.usage_in_bytes", "",
    ("total_active_file", "total_inactive_file"), ("total_dirty", "total_writeback"),
)  # fmt: skip
_V2 = _Version(
    "memory.max", "memory.current", "memory.swap.max",
    ("active_file", "inactive_file"), ("file_dirty", "file_writeback"),
)  # fmt: skip


def memory_groups(membership: Path = Path("/proc/self/cgroup"), root: Path = ROOT) -> list[MemoryGroup]:
    """The cgroup and those around it, as far as they can be seen. All their limits hold. None without cgroups."""
    try:
        version, path = _hierarchy(membership.read_text())
    except OSError:
        return []
    base = root / "memory" if version is _V1 else root
    return [group for folder in _around(base, path) if (group := _read(folder, version))]


def free_bytes(groups: list[MemoryGroup]) -> int:
    """What the tightest of them leaves."""
    return min((group.free_bytes for group in groups), default=UNLIMITED)


def _hierarchy(membership: str) -> tuple[_Version, str]:
    """Which version has the memory controller, and the path in it, from the text of /proc/self/cgroup."""
    paths = {names: path for _, names, path in (line.split(":", 2) for line in membership.splitlines())}
    for names, path in paths.items():
        if "memory" in names.split(","):
            return _V1, path
    return _V2, paths.get("", "/")


def _around(base: Path, path: str) -> Iterator[Path]:
    """Folders from a cgroup's own to the root of the mount. One outside of what is mounted here begins with `..`."""
    steps = [step for step in path.split("/") if step not in ("", "..")]
    for count in range(len(steps), -1, -1):
        yield base.joinpath(*steps[:count])


def _read(folder: Path, version: _Version) -> MemoryGroup | None:
    """None if there is no such cgroup, or one without a limit: the root."""
    try:
        limit, used, stat = ((folder / name).read_text() for name in (version.limit, version.used, "memory.stat"))
        swap = (folder / version.swap).read_text() if version.swap and (folder / version.swap).exists() else "max"
    except OSError:
        return None
    counts = {key: int(value) for key, _, value in (line.partition(" ") for line in stat.splitlines())}
    cached, dirty = (sum(counts.get(key, 0) for key in keys) for keys in (version.cached, version.dirty))
    return MemoryGroup(_bytes(limit), int(used), max(0, cached - dirty), _bytes(swap))


def _bytes(text: str) -> int:
    return UNLIMITED if text.strip() == "max" else min(UNLIMITED, int(text))
