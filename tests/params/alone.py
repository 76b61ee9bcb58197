"""Reads every file of tests/abuse, each in a process of its own that may take 64 MiB more than it has.

    python -m tests.params.alone

Says of each, as one list of JSON, what came of it, how long it took and how much memory at most.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from services.errors import BadCheckpoint
from services.params.checkpoint import read_checkpoint
from tests.abuse import gguf, safetensors
from tests.params.fuzz import GOOD, limit_memory

FILES = {"safetensors": safetensors.FILES, "gguf": gguf.FILES}
HANG_S = 5  # a guard, no figure

Outcome = dict[str, Any]


def memory_bytes(kind: str) -> int:
    """Of this process: VmRSS, resident now; VmHWM, the most since it was reset."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(kind)).split()[1]) << 10


def read_limited(path: Path) -> Outcome:
    """Read a file with the limits on; for a process that ends after it."""
    signal.alarm(HANG_S)
    limit_memory()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = memory_bytes("VmRSS")
    start = time.perf_counter()
    try:
        read_checkpoint(path)
        end = "read"
    except BadCheckpoint:
        end = "refused"
    except Exception as error:  # MemoryError too
        end = type(error).__name__
    took_s = time.perf_counter() - start
    return {"end": end, "ms": 1e3 * took_s, "peak_bytes": max(0, memory_bytes("VmHWM") - before)}


def read_alone(path: Path) -> Outcome:
    """Read a file in a child; one that dies says how."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writing, json.dumps(read_limited(path)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        said = answer.read()
    status = os.waitpid(child, 0)[1]
    outcome: Outcome = json.loads(said) if said else {"end": f"died: {status}", "ms": 0.0, "peak_bytes": 0}
    return outcome


def read_all() -> Iterator[Outcome]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for kind, files in FILES.items():
            path = Path(folder) / f"model.{kind}"
            path.write_bytes(GOOD[kind][0])
            read_checkpoint(path)  # children need not be the first to come here
            for case, (raw, _) in files.items():
                path.write_bytes(raw)
                yield {"format": kind, "case": case} | read_alone(path)


if __name__ == "__main__":
    print(json.dumps(list(read_all())))
