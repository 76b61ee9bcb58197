"""What a process takes of the machine, from /proc."""

from __future__ import annotations

import os
import re
from pathlib import Path


def pss(pid: int, kind: str = "Pss") -> int:
    """A process's share of memory, bytes; of one kind, as the kernel calls it."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(rf"^{kind}:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None, text
    return int(found[1]) * 1024


def own_bytes(pid: int) -> int:
    """Resident memory but for shared memory, bytes."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in status if line.startswith(("RssAnon", "RssFile"))) << 10


def cpu_s(pid: int) -> float:
    """CPU time it has used, seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def storage_bytes(pid: int) -> int:
    """What it has had read from storage; its own program's files too, where they were not cached."""
    return int(Path(f"/proc/{pid}/io").read_text().partition("\nread_bytes: ")[2].split()[0])
