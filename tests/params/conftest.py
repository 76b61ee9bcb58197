"""A folder in shared memory for each test that wants one."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def memory() -> Iterator[Path]:
    """As a loader makes its own: for its owner alone, gone after the test."""
    folder = Path(f"/dev/shm/headwater-test-{os.getpid()}-{time.monotonic_ns()}")
    folder.mkdir(mode=0o700)
    yield folder
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
