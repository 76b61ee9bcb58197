"""A stack that a test may break."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stack import Stack, running


@pytest.fixture
def own(tiny_folders: dict[str, Path], tmp_path: Path) -> Iterator[Stack]:
    """A stack that a test may break, with the models "tiny" and "flux"."""
    with running(tmp_path, {name: tiny_folders[name] for name in ("tiny", "flux")}) as stack:
        yield stack
