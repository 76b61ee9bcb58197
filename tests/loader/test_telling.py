"""How far fills are: in the log, and as a bar on the loader's own terminal."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import signal
import subprocess
import sys
import time

from services.loader.telling import Filling, telling
from services.rpc.loader_client import LoaderClient
from tests.loader.support import ROOT, Workbench, environment, prepared, tensor_bytes


class Heard:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Filling] = []
        self.ended = 0

    def tell(self, now: Filling) -> None:
        self.told.append(now)

    def end(self) -> None:
        self.ended += 1


def test_each_burst_of_fills_is_told_to_its_own_teller() -> None:
    """From the first byte to the last; nothing while nothing is filled; one that the loader's end cuts off ends too."""
    tellers: list[Heard] = []
    now = Filling()

    def new() -> Heard:
        tellers.append(Heard())
        return tellers[-1]

    async def use() -> None:
        nonlocal now
        async with telling(lambda: now, new, 0.001):
            for burst in (1, 2):
                await asyncio.sleep(0.02)
                assert len(tellers) == burst - 1
                now = Filling(("a",), burst, 10)
                await asyncio.sleep(0.02)
                if burst == 1:
                    now = Filling()
                    await asyncio.sleep(0.02)

    asyncio.run(use())
    assert [teller.ended for teller in tellers] == [1, 1]
    assert [{told.ready_bytes for told in teller.told} for teller in tellers] == [{1}, {2}]


def test_a_long_fill_is_in_the_log(bench: Workbench) -> None:
    """Models, bytes, rate and time left every few seconds, and how long it took."""
    tensors = bench.add_model("toy", block_count=40)

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            await prepared(client, "toy")

    with bench.loader("--max-fill-rate", f"{tensor_bytes(tensors) // 7}"):
        asyncio.run(use())
        line = next(line for line in bench.log.read_text().splitlines() if "event=filling" in line)
        facts = dict(re.findall(r"(\w+)=(\S+)", line))
        assert "toy" in facts["models"]
        assert 0 < int(facts["ready_bytes"]) < int(facts["total_bytes"])
        assert int(facts["bytes_per_second"]) > 0
        assert float(facts["eta_s"]) > 0


def test_a_terminal_sees_a_bar_and_whole_log_lines(bench: Workbench) -> None:
    """The bar has bytes, rate and time left; it is gone at the end, and no log line is torn by it."""
    bench.add_model("toy", block_count=20)
    master, slave = pty.openpty()
    arguments = ["--models", str(bench.write_models()), "--listen", bench.address, "--arena-dir", str(bench.arena_dir)]
    command = [sys.executable, "-m", "services.loader", *arguments, "--extent-bytes", "16KiB", "--eager-load",
               "--max-fill-rate", "200KB"]  # fmt: skip
    variables = environment() | {"TERM": "xterm-256color", "COLUMNS": "200"}
    process = subprocess.Popen(command, cwd=ROOT, env=variables, stderr=slave)
    os.close(slave)
    screen = b""
    deadline = time.monotonic() + 30
    while b"event=ready component=transformer" not in screen and time.monotonic() < deadline:
        screen += os.read(master, 65536)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.decode())
    assert re.search(r"toy .*━.* kB .*/s 0:00:0", text)
    assert re.search(r"timestamp=\S+ level=info event=ready component=transformer size_bytes=\d+", text)
    os.close(master)
