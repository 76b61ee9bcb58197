"""Which file system a path is on, from /proc/self/mountinfo."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Mount:
    """Where a file system is mounted, its kind ("tmpfs"), and its own options."""

    point: Path
    kind: str
    options: frozenset[str]


def mount_of(path: Path) -> Mount:
    """The mount that `path`, which exists, is on. Raises OSError."""
    device = path.stat().st_dev
    found = mounts(Path("/proc/self/mountinfo").read_text(), f"{os.major(device)}:{os.minor(device)}")
    inside = [mount for mount in found if path.resolve().is_relative_to(mount.point)]
    # A file system may be mounted twice; the later mount hides the earlier one.
    return max(reversed(inside or found), key=lambda mount: len(mount.point.parts), default=_UNKNOWN)


def mounts(mountinfo: str, device: str) -> list[Mount]:
    """Mounts of the file system with a device number such as "0:25"."""
    found = []
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, (kind, _, options) = left.split(), right.split(" ")
        if fields[2] == device:
            found.append(Mount(Path(_plain(fields[4])), kind, frozenset(options.split(","))))
    return found


def _plain(field: str) -> str:
    """The kernel writes spaces and the like as a backslash and three octal digits."""
    return field.encode().decode("unicode_escape").encode("latin-1").decode(errors="surrogateescape")


_UNKNOWN = Mount(Path("/"), "an unknown file system", frozenset())
