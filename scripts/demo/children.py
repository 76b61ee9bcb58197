"""The processes of the demo: started in sessions of their own, so that a terminal's Ctrl-C reaches the demo only, and
stopped in the reverse order of their start."""

import os
import subprocess
import sys
import time
from pathlib import Path

from signals import StopFlag

GRACE_S = 8.0


class ChildError(Exception):
    """A process ended that should not have; the message is for people."""


class Children:
    """A context manager; at its end no process is left that it started."""

    def __init__(self, logs: Path, stop: StopFlag, threads: int) -> None:
        self._logs = logs
        self._stop = stop
        self._environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        self._started: list[tuple[str, subprocess.Popen[bytes]]] = []

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, *exception: object) -> None:
        while self._started:
            self._end(self._started[-1][1])
            self._started.pop()

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start one of this environment's commands, its output going to NAME.log. Raises StoppedError, ChildError."""
        self._stop.check()
        program = Path(sys.executable).parent / command[0]
        if not program.exists():
            raise ChildError(f"{program} is missing: run make setup")
        with self.log(name).open("wb") as log:
            process = subprocess.Popen(
                [program, *command[1:]],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started.append((name, process))
        return process

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until a process has done its work. Raises StoppedError, ChildError."""
        while process.poll() is None:
            self._stop.tick()
        name = next(name for name, started in self._started if started is process)
        self._started.remove((name, process))
        if process.returncode:
            raise self._failure(name, process)

    def check_alive(self) -> None:
        """Raises ChildError if a process has ended."""
        for name, process in self._started:
            if process.poll() is not None:
                raise self._failure(name, process)

    def log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _failure(self, name: str, process: subprocess.Popen[bytes]) -> ChildError:
        lines = self.log(name).read_text(errors="replace").splitlines()
        report = [f"{name} ended with {process.returncode}; its last lines:", *lines[-15:]]
        for other, _ in self._started:
            errors = [
                line for line in self.log(other).read_text(errors="replace").splitlines() if "level=error" in line
            ]
            report += [f"{other}: {line}" for line in errors[-1:]]
        return ChildError("\n".join(report))

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """SIGTERM, then SIGKILL if it takes too long or somebody asks twice."""
        process.terminate()
        deadline = time.monotonic() + GRACE_S
        while process.poll() is None and time.monotonic() < deadline and self._stop.count < 2:
            time.sleep(0.02)
        process.kill()
        process.wait()
