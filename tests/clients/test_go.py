"""The Go program does what every client does."""

import subprocess
from collections.abc import Callable
from typing import NoReturn

import pytest

from tests.clients.behaviour import ClientBehaviour
from tests.clients.scripted_sampler import ROOT

pytestmark = pytest.mark.clients

FOLDER = ROOT / "clients" / "go"
TOOL_MISSING = 69


@pytest.fixture(scope="module")
def program(without_toolchain: Callable[[str], NoReturn]) -> list[str]:
    """The command, freshly built."""
    build = subprocess.run([FOLDER / "build.sh"], capture_output=True, text=True, check=False)
    if build.returncode == TOOL_MISSING:
        without_toolchain(build.stderr.strip())
    assert build.returncode == 0, build.stderr
    return [str(FOLDER / "build" / "headwater-go")]


class TestGo(ClientBehaviour):
    """clients/go."""


@pytest.mark.usefixtures("program")
def test_source_is_formatted() -> None:
    """gofmt has nothing to change."""
    listing = subprocess.run(["gofmt", "-l", FOLDER / "main.go"], capture_output=True, text=True, check=True)

    assert listing.stdout == ""
