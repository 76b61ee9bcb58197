"""A host that gives too little: refused or told at the start, with the numbers and the setting."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from services import errors
from services.loader.arenas import ArenaDir
from services.loader.cgroup import MemoryGroup
from services.loader.entries import ConfigError
from services.loader.mounts import Mount, mount_of, mounts
from services.loader.preflight import Ceiling, budget, check_nodes, limits, swapping
from services.params import placement
from services.params.placement import ONLINE, Placement, online_nodes
from services.rpc.loader_client import LoaderClient
from tests.loader.support import Workbench, attach_component, prepared, terminate

MIB = 1 << 20
NOBODY = 65534
SHM = Mount(Path("/dev/shm"), "tmpfs", frozenset({"rw", "size=65536k"}))
DOCKERS = Ceiling("the tmpfs /dev/shm", 64 * MIB, "enlarge it: docker run --shm-size")

MOUNTINFO = """22 1 0:21 / / rw,relatime - overlay overlay rw,lowerdir=/a
25 22 0:23 / /dev/shm rw,nosuid shared:3 - tmpfs shm rw,size=65536k,inode64
26 22 0:24 / /mnt/two\\040words rw - tmpfs  rw,size=4g,noswap
27 22 0:23 /inner /models rw - tmpfs shm rw,size=65536k,inode64
"""
SWAPS = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
SWAPS_ON = SWAPS + "/dev/dm-1                               partition\t8388604\t\t0\t\t-2\n"


def on_tmpfs(bench: Workbench, size: str) -> tuple[str, ...]:
    """Starts a process that has a tmpfs of a size, in the kernel's words, for its arena folder."""
    bench.arena_dir.mkdir(exist_ok=True)
    mount = f'mount -t tmpfs -o size={size} tmpfs {bench.arena_dir} && exec "$@"'
    return ("unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh")


def can_mount() -> bool:
    probe = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="needs the right to mount a tmpfs")


def refusal(bench: Workbench, *flags: str, prefix: tuple[str, ...] = ()) -> str:
    """What a loader says that does not start: one line, and exit code 1."""
    bench.log.write_text("")
    process = bench.start(*flags, prefix=prefix)
    try:
        assert process.wait(20) == 1, bench.log.read_text()
    finally:
        process.kill()  # one that serves after all
        process.wait()
    said = bench.log.read_text()
    assert said.startswith("headwater-loader: ")
    assert said.count("\n") == 1
    return said


# ---- what is said of numbers


def test_what_fits_is_not_mentioned() -> None:
    assert list(DOCKERS.judge({"a": 64 * MIB, "b": 1})) == []
    assert list(DOCKERS.judge({})) == []


def test_models_too_large_are_named_with_their_sizes() -> None:
    """Those, not the others, and the setting."""
    (text,) = DOCKERS.judge({"small": MIB, "sdxl": 7000 * MIB, "flux": 34000 * MIB + 1})

    assert text == (
        "2 of 3 models will be refused, for they do not fit the tmpfs /dev/shm of 64.0 MiB:"
        " flux (34000.1 MiB), sdxl (7000.0 MiB); enlarge it: docker run --shm-size"
    )


def test_if_nothing_fits_the_smallest_is_named() -> None:
    """With the number that would do, rounded up."""
    with pytest.raises(ConfigError, match=r"smallest model, sdxl, fits .*: it needs 7000\.1 MiB of 64\.0 MiB; enlarge"):
        list(DOCKERS.judge({"sdxl": 7000 * MIB + 1, "flux": 34000 * MIB}))


def test_a_budget_larger_than_what_there_is_for_it() -> None:
    """Once for the tmpfs and once for the container's memory; each is named with its setting."""
    ceilings = [DOCKERS, *limits([MemoryGroup(), MemoryGroup(limit_bytes=1024 * MIB)])]

    shm, memory = budget(2048 * MIB, ceilings, {"a": MIB})

    assert shm.startswith("--host-budget is 2048.0 MiB, and the tmpfs /dev/shm has only 64.0 MiB: lower")
    assert "cgroup has only 1024.0 MiB" in memory
    for setting in ("--memory", "resources.limits.memory", "MemoryMax="):
        assert setting in memory
    assert list(budget(64 * MIB, ceilings, {"a": MIB})) == []
    assert list(budget(None, ceilings, {"a": MIB})) == []


def test_no_limit_is_no_ceiling() -> None:
    assert limits([]) == limits([MemoryGroup()]) == []


@pytest.mark.parametrize(
    ("swaps", "mount", "swap_bytes", "said"),
    [
        (SWAPS, SHM, None, ""),
        (SWAPS_ON, SHM, None, "up to 8191.9 MiB of arenas may be swapped out"),
        (SWAPS_ON, SHM, 100 * MIB, "up to 100.0 MiB"),
        (SWAPS_ON, SHM, 0, ""),
        (SWAPS_ON, Mount(SHM.point, "tmpfs", frozenset({"rw", "noswap"})), None, ""),
        (SWAPS_ON, Mount(SHM.point, "ext4", frozenset()), None, ""),
    ],
)
def test_swap_is_told_if_arenas_may_be_in_it(swaps: str, mount: Mount, swap_bytes: int | None, said: str) -> None:
    """Not without swap, where the mount has none, or where the cgroup may have none."""
    groups = [] if swap_bytes is None else [MemoryGroup(swap_bytes=swap_bytes)]

    texts = list(swapping(swaps, mount, groups))

    assert len(texts) == bool(said)
    for text in texts:
        assert text.startswith(said)
        assert all(setting in text for setting in ("noswap", "--memory-swap", "MemorySwapMax=0", "/dev/shm"))


def test_mounts_are_read_as_the_kernel_writes_them() -> None:
    """Spaces in names, no source, and one file system at two places."""
    assert [str(mount.point) for mount in mounts(MOUNTINFO, "0:23")] == ["/dev/shm", "/models"]
    (mount,) = mounts(MOUNTINFO, "0:24")
    assert mount == Mount(Path("/mnt/two words"), "tmpfs", frozenset({"rw", "size=4g", "noswap"}))
    assert mount_of(Path("/proc/self")).kind == "proc"


# ---- what a loader does


@needs_mount
def test_a_tmpfs_too_small_for_any_model_is_refused(bench: Workbench) -> None:
    """With its size, the model's, and how Docker, Kubernetes and hosts enlarge it."""
    bench.add_model("large", block_count=40)
    bench.add_model("toy")

    said = refusal(bench, prefix=on_tmpfs(bench, "128k"))

    assert f"not even the smallest model, toy, fits the tmpfs {bench.arena_dir}: it needs 0.3 MiB of 0.1 MiB" in said
    for setting in ("--shm-size", "sizeLimit", "mount -o remount,size="):
        assert setting in said


@needs_mount
def test_a_tmpfs_too_small_for_some_models_is_told(bench: Workbench) -> None:
    """The large one by name; asked for all the same, it is refused with what to change. The other is served."""
    bench.add_model("large", block_count=40)
    bench.add_model("toy")

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            with pytest.raises(errors.HostMemoryFull, match="the limit is the size of the loader's tmpfs"):
                await prepared(client, "large")
            await prepared(client, "toy")

    with bench.loader("--host-budget", "1GiB", prefix=on_tmpfs(bench, "400k")):
        asyncio.run(use())
    said = bench.log.read_text()
    assert "1 of 2 models will be refused" in said
    assert "large (1.3 MiB); enlarge it" in said
    assert "--host-budget is 1024.0 MiB, and the tmpfs" in said


@needs_mount
def test_a_tmpfs_without_a_size_has_room(bench: Workbench) -> None:
    """The kernel counts no blocks of it."""
    bench.add_model("toy")

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            await prepared(client, "toy")

    with bench.loader(prefix=on_tmpfs(bench, "0")):
        asyncio.run(use())


def test_a_budget_too_small_for_any_model_is_refused_with_what_it_takes(bench: Workbench) -> None:
    """That much is enough. What a dead loader left in memory is still there for the loader that starts."""
    bench.add_model("toy")

    async def use() -> int:
        async with LoaderClient(bench.address) as client:
            model = await prepared(client, "toy")
            return model.read_bytes

    with bench.loader() as process:
        assert asyncio.run(use()) > 0
        process.kill()
    said = refusal(bench, "--host-budget", "100KiB")
    assert "fits --host-budget" in said
    need = re.search(r"it needs ([0-9.]+ MiB) of 0\.0 MiB; raise --host-budget", said)
    assert need

    bench._served = 0  # the log was begun anew
    with bench.loader("--host-budget", need[1]) as process:
        assert asyncio.run(use()) == 0
        assert terminate(process) == 0


def test_a_cgroup_too_small_for_any_model_is_refused(bench: Workbench) -> None:
    """Rather than killed in the middle of the fill."""
    bench.add_model("toy", width=2000)
    with limited(48 * MIB) as join:
        said = refusal(bench, prefix=join)

    assert re.search(r"toy, fits the memory limit of the loader's cgroup: it needs 1[0-9]{2}\.. MiB of 48\.0 MiB", said)
    assert "resources.limits.memory" in said


@contextmanager
def limited(size_bytes: int) -> Iterator[tuple[str, ...]]:
    """Starts a process in a cgroup with a limit of memory."""
    root = Path("/sys/fs/cgroup/memory")
    if not os.access(root / "cgroup.procs", os.W_OK):
        pytest.skip("needs a cgroup of version 1 to write to")
    group = root / f"headwater-test-{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(size_bytes))
    try:
        yield ("sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh")
    finally:
        group.rmdir()


# ---- where memory comes from


@pytest.mark.skipif(not ONLINE.exists(), reason="needs a kernel with NUMA")
@pytest.mark.parametrize(("flags", "policy"), [(("--numa", "0"), "prefer:0"), ((), "default")])
def test_a_loader_places_its_arenas(bench: Workbench, flags: tuple[str, ...], policy: str) -> None:
    """Asked from the process that maps one; a loader that takes it over changes nothing of it."""
    bench.add_model("toy")

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            model = await prepared(client, "toy")
            with attach_component(bench, model, "transformer") as arena:
                lines = Path("/proc/self/numa_maps").read_text().splitlines()
                assert [line.split()[1] for line in lines if f"{bench.arena_dir}/transformer-" in line] == [policy]
                assert arena.data

    with bench.loader(*flags) as process:
        asyncio.run(use())
        process.kill()
    with bench.loader("--numa", "interleave"):
        asyncio.run(use())


def test_a_node_that_is_not_there_is_refused(bench: Workbench) -> None:
    """With those that are."""
    bench.add_model("toy")
    nodes = ", ".join(map(str, online_nodes()))

    assert f"--numa: this host has no node 1023, only {nodes}\n" in refusal(bench, "--numa", "0,1023")


def test_only_a_tmpfs_is_placed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="/data is ext4: leave it out"):
        check_nodes(Placement((0,)), Mount(Path("/data"), "ext4", frozenset()))


@pytest.mark.parametrize(("number", "words"), [(errno.EPERM, "SYS_NICE"), (errno.EINVAL, "cpuset-mems")])
def test_a_kernel_that_refuses_is_told_why(monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    """What containers and cpusets do cannot be had here: the call is made to fail as they do."""

    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(placement, "set_policy", refuse)
    with pytest.raises(ConfigError, match=rf"places no memory so \({os.strerror(number)}\); .*{words}"):
        check_nodes(Placement((0,)), SHM)


# ---- whose the folder is


@contextmanager
def as_nobody() -> Iterator[None]:
    """This process without root's rights."""
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give folders away")
def test_a_folder_of_another_user_is_refused(bench: Workbench) -> None:
    """With its owner, its mode, and what to do."""
    bench.arena_dir.mkdir(mode=0o755)
    os.chown(bench.arena_dir, NOBODY, NOBODY)
    with pytest.raises(ConfigError, match="owner uid 65534 and mode 0755, and the loader runs as uid 0: chown it, run"):
        ArenaDir.open(bench.arena_dir)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give folders away")
@pytest.mark.parametrize(
    ("mode", "owner", "folder", "words"),
    [
        (0o500, NOBODY, "", "owner uid 65534 and mode 0500, and the loader has to write there: chmod u"),
        (0o755, 0, "inner", "Permission denied; {}/arenas has owner uid 0 and mode 0755, .* as uid 65534: chown or"),
        (0o700, 0, "inner/most", "Permission denied; {}/arenas has owner uid 0 and mode 0700"),
    ],
)
def test_missing_rights_are_named(bench: Workbench, mode: int, owner: int, folder: str, words: str) -> None:
    """In a folder of one's own, and where one is to be made."""
    bench.memory.chmod(0o755)
    bench.arena_dir.mkdir()
    bench.arena_dir.chmod(mode)
    os.chown(bench.arena_dir, owner, owner)
    with as_nobody(), pytest.raises(ConfigError, match=words.format(bench.memory)):
        ArenaDir.open(bench.arena_dir / folder)
