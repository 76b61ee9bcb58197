"""Real loaders and samplers as processes, for tests: started on sockets of their own, killed at the end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START_S = 90


@dataclass
class Process:
    """A running service."""

    popen: subprocess.Popen[bytes]
    log: Path
    addresses: list[str] = field(default_factory=list)

    @property
    def pid(self) -> int:
        return self.popen.pid

    def kill(self) -> None:
        """SIGKILL, and wait until the kernel has cleaned up."""
        self.popen.kill()
        self.popen.wait(30)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(60)

    def wait_for(self, text: str, count: int = 1) -> str:
        """The log once it has `text` so often. Fails with the log if the process ends or takes too long."""
        deadline = time.monotonic() + START_S
        while (log := self.log.read_text()).count(text) < count:
            assert self.popen.poll() is None, log
            assert time.monotonic() < deadline, log
            time.sleep(0.02)
        return log


class Stack:
    """One arena folder, one models.toml, any number of processes over them."""

    def __init__(self, disk: Path, models: dict[str, Path]) -> None:
        self.disk = disk
        self.memory = Path("/dev/shm") / f"headwater-test-{os.getpid()}-{time.monotonic_ns()}"
        self.memory.mkdir(mode=0o700)
        self.arena_dir = self.memory / "arenas"
        self.processes: list[Process] = []
        tables = (f'[models.{name}]\nfolder = "{folder}"\n' for name, folder in models.items())
        (disk / "models.toml").write_text("".join(tables))

    @property
    def loader_address(self) -> str:
        return f"unix:{self.memory}/loader.sock"

    def loader(self, *flags: str, extent_bytes: str = "16KiB") -> Process:
        process = self._start(
            "services.loader", "--models", str(self.disk / "models.toml"), "--listen", self.loader_address,
            "--extent-bytes", extent_bytes, *flags,
        )  # fmt: skip
        process.wait_for("event=serving")
        return process

    def sampler(
        self,
        *flags: str,
        gate_limit: int = 8192,
        until: str = "loader connected",
        module: str = "services.sampler",
    ) -> Process:
        """A sampler on a Unix socket (addresses[0]) and a TCP port (addresses[1]), once its log says `until`.

        One that does not serve by then has no addresses yet.
        """
        socket = f"unix:{self.memory}/sampler{len(self.processes)}.sock"
        device = () if "--device" in flags else ("--device", "cpu")
        process = self._start(
            module, "--loader", self.loader_address, "--listen", socket, "--listen", "127.0.0.1:0",
            "--gate-limit", str(gate_limit), "--grace", "5", *device, *flags,
        )  # fmt: skip
        log = process.wait_for(until)
        process.addresses = re.findall(r"'([^']*)'", log.partition("addresses=")[2].split("]")[0])
        return process

    def _start(self, module: str, *arguments: str) -> Process:
        log = self.disk / f"{module}-{len(self.processes)}.log"
        command = [sys.executable, "-m", module, "--arena-dir", str(self.arena_dir), *arguments]
        path = f"{ROOT}/gen:{ROOT}:{os.environ.get('PYTHONPATH', '')}"
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        with log.open("wb") as file:
            popen = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        self.processes.append(Process(popen, log))
        return self.processes[-1]

    def close(self) -> None:
        for process in reversed(self.processes):
            if process.popen.poll() is None:
                process.kill()
        shutil.rmtree(self.memory, ignore_errors=True)


@contextmanager
def running(disk: Path, models: dict[str, Path]) -> Iterator[Stack]:
    """A stack with nothing started yet."""
    stack = Stack(disk, models)
    try:
        yield stack
    finally:
        stack.close()
