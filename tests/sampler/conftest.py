"""A stack that a test may break."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stack import Stack, running


@pytest.fixture
def own(tiny_folders: dict[str, Path], tmp_path: Path) -> Iterator[Stack]:
    """A stack that a test may break, with the models "tiny" and "flux"."""
    with running(tmp_path, {name: tiny_folders[name] for name in ("tiny", "flux")}) as stack:
        yield stack


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in shared memory, as a loader makes its own: for its owner alone."""
    folder = Path(f"/dev/shm/headwater-test-{os.getpid()}-{time.monotonic_ns()}")
    folder.mkdir(mode=0o700)
    yield folder
    folder.rmdir()
