"""A process that maps an arena and then does what it is told: a word a line, a line of answer to each.

    python -m tests.loader.puppet ARENA GENERATION

lock, unlock: keep its pages in memory (mlock), or no longer; answers with the kernel's count of locked kB
register, unregister: page-lock them for the CUDA device as samplers do, or no longer; answers with the driver's error
digest: XXH3-128 of all data, as it reads it now
close: give the lease back, as AttachedArena.close does, while a view of the data lives on
drop: let go of the view, and with it of the memory
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import xxhash

from services.params.arena import AttachedArena, attach
from services.params.mapping import c_library
from services.sampler.driver import Driver
from tests.loader.support import ROOT, environment


class Puppet:
    """The process as its driver has it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid

    def tell(self, word: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        return self.hear()

    def hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def puppet(path: Path, generation: str) -> Iterator[Puppet]:
    """A puppet that maps; killed at the end."""
    command = [sys.executable, "-m", "tests.loader.puppet", str(path), generation]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, stdin=pipe, stdout=pipe) as process:
        made = Puppet(process)
        assert made.hear() == "mapped"
        try:
            yield made
        finally:
            process.kill()


class Strings:
    """What the words do."""

    def __init__(self, arena: AttachedArena) -> None:
        self._arena: AttachedArena | None = arena
        self._view: memoryview | None = arena.data[:]

    def lock(self) -> str:
        return self._call(c_library().mlock)

    def unlock(self) -> str:
        return self._call(c_library().munlock)

    def register(self) -> str:
        return str(self._driver().lock(*self._place(), read_only=True))

    def unregister(self) -> str:
        return str(self._driver().unlock(self._place()[0]))

    def digest(self) -> str:
        assert self._view is not None
        return xxhash.xxh3_128_hexdigest(self._view)

    def close(self) -> str:
        assert self._arena is not None
        self._arena.close()
        return "closed"

    def drop(self) -> str:
        self._arena = self._view = None
        return "dropped"

    def _driver(self) -> Driver:
        import torch  # seconds, and a device, that other words do without

        torch.cuda.current_stream()
        return Driver()

    def _place(self) -> tuple[int, int]:
        assert self._view is not None
        return np.frombuffer(self._view, np.uint8).ctypes.data, len(self._view)

    def _call(self, call: ctypes._NamedFuncPointer) -> str:
        address, size_bytes = self._place()
        if call(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes)):
            return f"errno {ctypes.get_errno()}"
        status = Path("/proc/self/status").read_text().splitlines()
        return next(line for line in status if line.startswith("VmLck")).split()[1]


def main(path: str, generation: str) -> None:
    strings = Strings(attach(Path(path), generation))
    print("mapped", flush=True)
    for word in sys.stdin:
        print(getattr(strings, word.strip())(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
