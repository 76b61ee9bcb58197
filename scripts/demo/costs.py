"""What the demo cost: bytes read from disk, and who holds how much of the one copy in memory."""

import re
from dataclasses import dataclass
from pathlib import Path

import grpc
from headwater.loader.v1 import loader_pb2, loader_pb2_grpc


@dataclass(frozen=True, slots=True)
class Mapping:
    """What one process has of the arenas: pages it touched, and its share of them (a page of two counts half)."""

    resident_bytes: int = 0
    proportional_bytes: int = 0
    private_bytes: int = 0


def read_bytes(loader: str, model: str) -> int:
    """What the loader has read from the checkpoint files."""
    with grpc.insecure_channel(loader) as channel:
        request = loader_pb2.GetModelRequest(model=model)
        return int(loader_pb2_grpc.LoaderServiceStub(channel).GetModel(request, timeout=10).model.read_bytes)


def arena_bytes(arenas: Path) -> int:
    """What the arenas occupy."""
    return sum(path.stat().st_blocks * 512 for path in arenas.glob("*.arena"))


def mapping_of(pid: int, arenas: Path) -> Mapping:
    """A process's mappings of the arenas, from /proc/PID/smaps."""
    resident = proportional = private = 0
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = f" {arenas}/" in line
        elif inside and (found := re.match(r"(Rss|Pss|Private_Dirty): +(\d+) kB", line)):
            size = int(found[2]) << 10
            resident += size * (found[1] == "Rss")
            proportional += size * (found[1] == "Pss")
            private += size * (found[1] == "Private_Dirty")
    return Mapping(resident, proportional, private)


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
