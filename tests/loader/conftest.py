"""A workbench for each test: folders that vanish with it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.loader.support import Workbench, workbench


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    with workbench(tmp_path) as made:
        yield made
