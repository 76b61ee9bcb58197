"""What a process that maps weights leaves when it crashes."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from services.params.owned_arena import OwnedArena
from tests.params.test_arena import GENERATION, make_header
from tests.stack import ROOT

CORE_BYTES = 200 << 20
IS_A_FILE = Path("/proc/sys/kernel/core_pattern").read_text().strip() == "core"
READER = """
import os, sys
from pathlib import Path
from services.params.arena import attach

arena = attach(Path(sys.argv[1]), sys.argv[2])
"""
WRITER = """
import os, sys
from pathlib import Path
from services.params.owned_arena import OwnedArena

window = OwnedArena.open(Path(sys.argv[1])).window(0)
memory = window.__enter__()
"""
CRASH = """
Path("/proc/self/coredump_filter").write_text("0x3f")  # files in shared memory too, which is not the kernel's default
os.chdir(sys.argv[3])
os.abort()
"""


@pytest.mark.skipif(not IS_A_FILE, reason="this machine's core dumps go elsewhere")
@pytest.mark.parametrize("program", [READER, WRITER])
def test_a_core_dump_is_small_whatever_is_mapped(memory: Path, tmp_path: Path, program: str) -> None:
    """A sampler's that maps more than the dump may have, and a loader's that fills an extent of as much."""
    size = CORE_BYTES + (20 << 20)
    arena = OwnedArena.create(memory / "t.arena", make_header(1, size, size))
    arena.reserve()
    infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    run = subprocess.run(
        [sys.executable, "-c", program + CRASH, str(arena.path), GENERATION, str(tmp_path)],
        cwd=ROOT, check=False, capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, infinite),
    )  # fmt: skip
    arena.close()

    assert run.returncode == -signal.SIGABRT, run.stderr
    (core,) = tmp_path.glob("core*")
    assert 0 < core.stat().st_size < CORE_BYTES
    core.unlink()
