"""What the host gives against what the models need, looked at once, at start, before a request finds out.

What no model can do without ends the start; what only some cannot is a warning. Either names the setting to change.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import structlog

from services.loader.cgroup import UNLIMITED, MemoryGroup, memory_groups
from services.loader.config import Config
from services.loader.entries import ConfigError
from services.loader.mounts import Mount, mount_of
from services.params.layout import PAGE
from services.params.placement import Placement, online_nodes

_NAMED_COUNT = 10  # models that a message names
_NUMA_REMEDIES = {
    errno.EPERM: "a container needs the right to: docker run --cap-add SYS_NICE, Kubernetes capabilities.add SYS_NICE",
    errno.EINVAL: "name nodes that its cpuset allows (docker run --cpuset-mems), or one: several need Linux 5.15",
}
_SWAPS = Path("/proc/swaps")  # kernels without swap have none

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Most bytes that arenas may take together because of one setting, and how to raise it."""

    name: str
    size_bytes: int
    remedy: str

    def judge(self, sizes: Mapping[str, int]) -> Iterator[str]:
        """A warning if some models, given by their sizes in bytes, do not fit. Raises ConfigError if none does."""
        large = sorted(name for name, size in sizes.items() if size > self.size_bytes)
        if not large:
            return
        if len(large) == len(sizes):
            least = min(large, key=sizes.__getitem__)
            what = f"not even the smallest model, {least}, fits {self.name}"
            raise ConfigError(f"{what}: it needs {_need(sizes[least])} of {_have(self.size_bytes)}; {self.remedy}")
        named = ", ".join(f"{name} ({_need(sizes[name])})" for name in large[:_NAMED_COUNT])
        yield (
            f"{len(large)} of {len(sizes)} models will be refused, for they do not fit {self.name} of"
            f" {_have(self.size_bytes)}: {named}; {self.remedy}"
        )


def check(config: Config, folder: Path, sizes: Mapping[str, int]) -> None:
    """Log what will not work of all that is configured. Raises ConfigError if nothing will.

    folder: of the arenas, made already; sizes: bytes of arenas that each model takes.
    """
    mount, groups = mount_of(folder), memory_groups()
    if config.numa:
        check_nodes(config.numa, mount)
    ceilings = [size_of(mount, folder)]
    if mount.kind == "tmpfs":  # pages of a disk's file system can be written back
        ceilings += limits(groups)
    warnings = chain(
        *(ceiling.judge(sizes) for ceiling in ceilings),
        budget(config.host_budget_bytes, ceilings, sizes),
        swapping(_SWAPS.read_text() if _SWAPS.exists() else "", mount, groups),
    )
    for warning in warnings:
        _log.warning("the host does not give what is configured", reason=warning)


def size_of(mount: Mount, folder: Path) -> Ceiling:
    """The file system of the arena folder."""
    room = os.statvfs(folder)
    size_bytes = room.f_blocks * room.f_frsize or UNLIMITED
    if mount.kind != "tmpfs":
        return Ceiling(f"the {mount.kind} of {folder}", size_bytes, "choose another --arena-dir")
    remedy = f"docker run --shm-size, Kubernetes emptyDir sizeLimit, or mount -o remount,size= {mount.point}"
    return Ceiling(f"the tmpfs {mount.point}", size_bytes, f"enlarge it: {remedy}")


def limits(groups: Sequence[MemoryGroup]) -> list[Ceiling]:
    """The tightest limit on memory, if there is one: who fills a tmpfs beyond it is killed."""
    least = min((group.limit_bytes for group in groups), default=UNLIMITED)
    if least == UNLIMITED:
        return []
    remedy = "raise it: docker run --memory, Kubernetes resources.limits.memory, systemd MemoryMax="
    return [Ceiling("the memory limit of the loader's cgroup", least, remedy)]


def budget(most: int | None, ceilings: Sequence[Ceiling], sizes: Mapping[str, int]) -> Iterator[str]:
    """The budget, bytes, against the models, and against what there is for it. Raises ConfigError."""
    if most is None:
        return
    yield from Ceiling("--host-budget", most, "raise --host-budget").judge(sizes)
    for ceiling in ceilings:
        if ceiling.size_bytes < most:
            yield (
                f"--host-budget is {_have(most)}, and {ceiling.name} has only {_have(ceiling.size_bytes)}:"
                f" lower --host-budget, or {ceiling.remedy}"
            )


def swapping(swaps: str, mount: Mount, groups: Sequence[MemoryGroup]) -> Iterator[str]:
    """Whether arenas may be in swap when a sampler reads them. swaps: the text of /proc/swaps."""
    size_bytes = sum(int(line.split()[-3]) for line in swaps.splitlines()[1:]) << 10
    most = min([size_bytes, *(group.swap_bytes for group in groups)])
    if most and mount.kind == "tmpfs" and "noswap" not in mount.options:
        yield (
            f"up to {_have(most)} of arenas may be swapped out, and a denoising step then waits for the disk:"
            f" mount {mount.point} with noswap (Linux 6.4), or turn swap off for the loader (docker run --memory-swap"
            " equal to --memory, systemd MemorySwapMax=0) or the host (swapoff -a)"
        )


def check_nodes(placement: Placement, mount: Mount) -> None:
    """Raises ConfigError if the kernel would not place arenas so, before one is made."""
    if mount.kind != "tmpfs":
        raise ConfigError(f"--numa places the memory of a tmpfs, and {mount.point} is {mount.kind}: leave it out")
    scratch = os.memfd_create("placement")  # is on a tmpfs of the kernel's own
    try:
        online = online_nodes()
        if unknown := sorted(set(placement.nodes) - set(online)):
            raise ConfigError(f"--numa: this host has no node {unknown[0]}, only {_listed(online)}")
        os.ftruncate(scratch, PAGE)
        placement.apply(scratch, PAGE)
    except OSError as error:
        remedy = _NUMA_REMEDIES.get(error.errno or 0, "leave it out")
        raise ConfigError(f"--numa: the kernel places no memory so ({error.strerror}); {remedy}") from error
    finally:
        os.close(scratch)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _need(size_bytes: int) -> str:
    """Rounded up: so much is enough."""
    return f"{math.ceil(size_bytes * 10 / 2**20) / 10:.1f} MiB"


def _have(size_bytes: int) -> str:
    """Rounded down: there is no less."""
    return f"{math.floor(size_bytes * 10 / 2**20) / 10:.1f} MiB"
