"""A crowd at one cold model."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

from headwater.loader.v1 import loader_pb2 as pb

from services.rpc.loader_client import LoaderClient
from tests.loader.support import ROOT, Workbench, environment, tensor_bytes

PROCESSES, CALLERS = 4, 25
SMALL_BYTES = 256 << 10  # headers, the model's configs, /proc/meminfo


def read_calls_bytes(pid: int) -> int:
    """What a process has read by any call so far."""
    return int(Path(f"/proc/{pid}/io").read_text().split()[1])


def start_callers(bench: Workbench) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.loader.callers", bench.address, "toy", str(CALLERS)],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def all_at_once(bench: Workbench) -> list[tuple[int, bool]]:
    """What each caller of all processes heard."""
    crowds = [start_callers(bench) for _ in range(PROCESSES)]
    for crowd in crowds:
        assert crowd.stdout is not None
        assert crowd.stdout.readline() == "ready\n"
    for crowd in crowds:
        assert crowd.stdin is not None
        crowd.stdin.write("go\n")
        crowd.stdin.flush()
    return [heard for crowd in crowds for heard in json.loads(crowd.communicate(timeout=60)[0])]


async def model(bench: Workbench) -> pb.Model:
    async with LoaderClient(bench.address) as client:
        return await client.get_model("toy")


def test_a_hundred_callers_of_four_processes_share_one_reading(bench: Workbench) -> None:
    """The loader says that it read each tensor once, and the kernel's count of its read calls says so too."""
    weights = tensor_bytes(bench.add_model("toy", width=512))
    with bench.loader("--buffered-io", "--max-fill-rate", "20MB") as loader:
        before = read_calls_bytes(loader.pid)
        heard = all_at_once(bench)
        read = read_calls_bytes(loader.pid) - before
        after = asyncio.run(model(bench))

    extents = sum(part.extent_count for part in after.components)
    assert heard == [[extents, True]] * PROCESSES * CALLERS
    assert after.read_bytes == weights
    assert weights <= read < weights + SMALL_BYTES
