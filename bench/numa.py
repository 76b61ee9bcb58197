"""Where an arena's pages are by NUMA node, for each placement that a loader can have, and what it does to copies.

    python bench/numa.py [--target /dev/shm] [--gib 4]

One arena for each of `--numa off`, `interleave` and every node, filled by threads that run on all nodes, as a loader's
do. Pages are counted from /proc/self/numa_maps. Copies go from the arena, page-locked as samplers lock it, to each
device; without CUDA, by a thread on each node into memory of its own node. Rates are the median of some copies.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench.common import GIB, Figures, pick_device, quiet_libraries, report, seconds, table
from services.params.arena import AttachedArena, attach
from services.params.header import Header
from services.params.layout import PAGE, place
from services.params.mapping import address_of
from services.params.owned_arena import OwnedArena
from services.params.placement import online_nodes, parse_list, parse_placement
from services.params.specs import TensorSpec
from services.sampler.driver import Driver

EXTENT_BYTES = 64 << 20
THREAD_COUNT = 8
COPY_COUNT = 5
GENERATION = "00" * 16


@contextmanager
def filled(folder: Path, placement: str, size: int, extent_bytes: int) -> Iterator[tuple[AttachedArena, float]]:
    """An arena with all its pages written, attached, and the rate of its fill in bytes per second."""
    count = size // extent_bytes
    specs = [TensorSpec(f"t.{n}", "U8", (extent_bytes,), 0, 0, extent_bytes) for n in range(count)]
    header = Header("numa", GENERATION, GENERATION, GENERATION, place(specs, extent_bytes))
    owned = OwnedArena.create(folder / "numa.arena", header, parse_placement(placement))
    try:
        start = time.perf_counter()
        with ThreadPoolExecutor(THREAD_COUNT) as pool:
            reserved = pool.submit(owned.reserve)
            list(pool.map(lambda extent: write(owned, extent), range(count)))
            reserved.result()
        rate = size / (time.perf_counter() - start)
        with attach(owned.path, GENERATION) as arena:
            yield arena, rate
    finally:
        owned.unlink(even_if_leased=True)
        owned.close()


def write(arena: OwnedArena, extent: int) -> None:
    nodes = online_nodes()
    run_on(nodes[extent % len(nodes)])
    with arena.window(extent) as memory:
        ctypes.memset(address_of(memory), 1, len(memory))


def run_on(node: int) -> None:
    """Keep this thread on the processors of a node; where it has none, as it was."""
    if cpus := Path(f"/sys/devices/system/node/node{node}/cpulist").read_text().strip():
        os.sched_setaffinity(0, parse_list(cpus))


def pages(name: str) -> Figures:
    """Policy and shares of a file's pages by node, as far as this process has touched them."""
    lines = Path("/proc/self/numa_maps").read_text().splitlines()
    line = next(line for line in lines if name in line)
    counts = {f"node{node}": int(count) for node, count in re.findall(r" N(\d+)=(\d+)", line)}
    return {"policy": line.split()[1]} | {node: count / sum(counts.values()) for node, count in counts.items()}


def to_node(data: memoryview, node: int) -> float:
    """Bytes per second that a thread on a node copies to memory of its node."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_copied, data, node).result()


def _copied(data: memoryview, node: int) -> float:
    run_on(node)
    source = torch.frombuffer(data, dtype=torch.uint8)
    target = torch.zeros_like(source)  # touched first here, so that it is on this node

    def copy() -> None:  # by this thread alone
        ctypes.memmove(target.data_ptr(), source.data_ptr(), len(source))

    return len(source) / statistics.median(seconds(copy, torch.device("cpu")) for _ in range(COPY_COUNT))


def to_device(data: memoryview, index: int) -> float:
    """Bytes per second from the arena, page-locked, to a device."""
    device, driver = torch.device("cuda", index), Driver()
    torch.cuda.set_device(device)
    source = torch.frombuffer(data, dtype=torch.uint8)
    target = torch.empty(len(source), dtype=torch.uint8, device=device)
    if error := driver.lock(source.data_ptr(), len(source), read_only=True):
        raise SystemExit(f"the driver locks no read-only memory: error {error}")

    def copy() -> None:
        target.copy_(source, non_blocking=True)

    try:
        copy()
        return len(source) / statistics.median(seconds(copy, device) for _ in range(COPY_COUNT))
    finally:
        driver.unlock(source.data_ptr())


def node_of(index: int) -> int | None:
    """The node that a CUDA device is at, as far as the machine says."""
    device = torch.cuda.get_device_properties(index)
    name = f"{device.pci_domain_id:04x}:{device.pci_bus_id:02x}:{device.pci_device_id:02x}.0"
    path = Path("/sys/bus/pci/devices") / name / "numa_node"
    return int(path.read_text()) if path.exists() else None


def measure(folder: Path, placement: str, size: int, extent_bytes: int) -> Figures:
    """A row: where the pages are, and how fast they are copied."""
    with filled(folder, placement, size, extent_bytes) as (arena, rate):
        sum(arena.data[::PAGE])  # touches every page: numa_maps counts those that this process has
        found: Figures = {"numa": placement, "fill_gb_s": rate / 1e9} | pages("numa.arena")
        if torch.cuda.is_available():
            rates = {f"cuda{n}_gb_s": to_device(arena.data, n) for n in range(torch.cuda.device_count())}
        else:
            rates = {f"cpus{n}_gb_s": to_node(arena.data, n) for n in online_nodes()}
    return found | {name: value / 1e9 for name, value in rates.items()}


def columns(rows: Sequence[Figures]) -> list[str]:
    """The names of all rows' figures; a node without pages is in none of some."""
    return list(dict.fromkeys(name for row in rows for name in row))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=Path("/dev/shm"), help="a folder on a tmpfs")
    parser.add_argument("--gib", type=float, default=4, help="size of the arena")
    parser.add_argument("--tiny", action="store_true", help="little memory, to try the code")
    options = parser.parse_args(arguments)
    quiet_libraries()
    extent_bytes = 1 << 20 if options.tiny else EXTENT_BYTES
    size = 4 * extent_bytes if options.tiny else int(options.gib * GIB) // extent_bytes * extent_bytes
    placements = ["off", "interleave", *map(str, online_nodes())]
    with tempfile.TemporaryDirectory(dir=options.target) as folder:
        rows = [measure(Path(folder), placement, size, extent_bytes) for placement in placements]
    names = columns(rows)
    table(f"{size / GIB:.2f} GiB of arena", names, [[row.get(name) for name in names] for row in rows])
    at = {f"cuda{n}": node_of(n) for n in range(torch.cuda.device_count())}
    report("numa", pick_device(), {"nodes": list(online_nodes()), "device_nodes": at, "rows": rows})


if __name__ == "__main__":
    main()
