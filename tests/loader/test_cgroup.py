"""What the cgroup allows, from files as kernels write them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.loader.cgroup import UNLIMITED, MemoryGroup, free_bytes, memory_groups
from tests.loader.support import ROOT

MIB = 1 << 20
HERE = Path("/sys/fs/cgroup/memory")  # of version 1

# Of a container that holds 300 MiB in a tmpfs and 50 MiB of page cache, 1 MiB of it not written yet.
STAT_V2 = """anon 20971520
file 367001600
shmem 314572800
file_mapped 4096
file_dirty 1048576
file_writeback 0
inactive_anon 335544320
active_anon 0
inactive_file 41943040
active_file 10485760
unevictable 0
"""
STAT_V1 = """cache 0
inactive_file 0
total_cache 367001600
total_shmem 314572800
total_dirty 1048576
total_writeback 0
total_inactive_anon 335544320
total_inactive_file 41943040
total_active_file 10485760
"""


def write(folder: Path, limit: str, used: int = 400 * MIB, swap: str = "max\n") -> None:
    """A cgroup of version 2."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"memory.max": limit, "memory.current": f"{used}\n", "memory.stat": STAT_V2, "memory.swap.max": swap}
    for name, text in texts.items():
        (folder / name).write_text(text)


def membership(folder: Path, text: str) -> Path:
    path = folder / "membership"
    path.write_text(text)
    return path


def test_memory_in_a_tmpfs_is_not_counted_as_free(tmp_path: Path) -> None:
    """Of the page cache only clean pages of files on disk are: `file` has the tmpfs's in it, which only swap frees."""
    write(tmp_path / "root", "536870912\n", swap="0\n")

    (group,) = memory_groups(membership(tmp_path, "0::/\n"), tmp_path / "root")

    assert group == MemoryGroup(512 * MIB, 400 * MIB, 49 * MIB, 0)
    assert group.free_bytes == (512 - 400 + 49) * MIB


def test_the_tightest_ancestor_counts(tmp_path: Path) -> None:
    """A slice's limit holds for all in it; the root of the host has none."""
    inner = tmp_path / "root" / "headwater.slice" / "loader.service"
    write(inner, "max\n", used=100 * MIB)
    write(inner.parent, f"{1024 * MIB}\n", used=1000 * MIB)

    groups = memory_groups(membership(tmp_path, "0::/headwater.slice/loader.service\n"), tmp_path / "root")

    assert [group.limit_bytes for group in groups] == [UNLIMITED, 1024 * MIB]
    assert free_bytes(groups) == (1024 - 1000 + 49) * MIB


@pytest.mark.parametrize("path", ["/", "/kubepods.slice/pod1/abc", "/../pod2"])
def test_a_container_sees_its_limit_at_the_root(tmp_path: Path, path: str) -> None:
    """Whether /proc tells its own path, the host's, or one outside of it."""
    write(tmp_path / "root", "536870912\n")

    groups = memory_groups(membership(tmp_path, f"0::{path}\n"), tmp_path / "root")

    assert [group.limit_bytes for group in groups] == [512 * MIB]


def test_version_1_is_read_where_it_has_the_memory(tmp_path: Path) -> None:
    """Also where version 2 is mounted beside it; its way to say "no limit" is a large number."""
    folder = tmp_path / "root" / "memory" / "docker" / "abc"
    for at, limit in ((folder, "536870912\n"), (tmp_path / "root" / "memory", "9223372036854771712\n")):
        at.mkdir(parents=True, exist_ok=True)
        (at / "memory.limit_in_bytes").write_text(limit)
        (at / "memory.usage_in_bytes").write_text("419430400\n")
        (at / "memory.stat").write_text(STAT_V1)
    text = "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/x:y\n0::/elsewhere\n"

    groups = memory_groups(membership(tmp_path, text), tmp_path / "root")

    assert groups[0] == MemoryGroup(512 * MIB, 400 * MIB, 49 * MIB)
    assert [group.limit_bytes for group in groups] == [512 * MIB, UNLIMITED]


def test_without_cgroups_nothing_is_limited(tmp_path: Path) -> None:
    """No such file, or no mount."""
    assert memory_groups(tmp_path / "none") == []
    assert memory_groups(membership(tmp_path, "0::/\n"), tmp_path / "root") == []
    assert free_bytes([]) == UNLIMITED


@pytest.fixture
def real_group() -> Iterator[Path]:
    """A cgroup of this machine with a limit of 64 MiB."""
    folder = HERE / f"headwater-test-{os.getpid()}"
    if not os.access(HERE / "cgroup.procs", os.W_OK):
        pytest.skip("needs a cgroup of version 1 to write to")
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text(str(64 * MIB))
    yield folder
    folder.rmdir()


def test_a_real_group_has_less_after_a_tmpfs_took_some(real_group: Path) -> None:
    """In a cgroup of 64 MiB: 16 MiB in shared memory are gone, 16 MiB in the page cache are not."""
    code = """
import os, sys, tempfile
from services.loader.cgroup import free_bytes, memory_groups
free = lambda: free_bytes(memory_groups())
before = free()
with tempfile.TemporaryFile(dir="/dev/shm") as shared, tempfile.TemporaryFile(dir=".") as cached:
    shared.write(bytes(16 << 20)); shared.flush()
    taken = before - free()
    cached.write(bytes(16 << 20)); cached.flush(); os.fsync(cached.fileno())
    print(before, taken, before - free())
"""
    join = f'echo $$ > {real_group}/cgroup.procs && exec "$@"'
    command = ["sh", "-c", join, "sh", sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    before, taken, taken_with_cache = (int(word) / MIB for word in run.stdout.split())

    assert 32 < before <= 64
    assert 15 < taken < 20
    assert taken_with_cache < 24
