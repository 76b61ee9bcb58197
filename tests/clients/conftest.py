"""Samplers for the clients to talk to, and what to do where a toolchain is missing."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests.clients.scripted_sampler import Sampler, running_sampler
from tests.stack import Process, running

# Before a test module imports it, so that its asserts explain themselves.
pytest.register_assert_rewrite("tests.clients.behaviour")


@pytest.fixture(scope="session")
def scripted_sampler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sampler]:
    """A server that can also lie, see scripted_sampler.py."""
    with running_sampler(tmp_path_factory.mktemp("scripted")) as sampler:
        yield sampler


@pytest.fixture
def doomed_sampler(tmp_path: Path) -> Iterator[Sampler]:
    """A server that a test may kill."""
    with running_sampler(tmp_path) as sampler:
        yield sampler


@pytest.fixture(scope="session")
def tiny_sampler(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A real sampler whose only model is "tiny"."""
    with running(tmp_path_factory.mktemp("stack"), {"tiny": tiny_folders["tiny"]}) as stack:
        stack.loader()
        yield stack.sampler()


@pytest.fixture(scope="session")
def sampler_tcp(tiny_sampler: Process) -> str:
    """HOST:PORT of a sampler with the model "tiny"."""
    return tiny_sampler.addresses[1]


@pytest.fixture(scope="session")
def sampler_unix(tiny_sampler: Process) -> str:
    """The same sampler's Unix socket."""
    return tiny_sampler.addresses[0]


@pytest.fixture(scope="session")
def without_toolchain() -> Callable[[str], NoReturn]:
    """Call it with what is missing: skips, or fails where HEADWATER_REQUIRE_CLIENTS is set."""

    def report(missing: str) -> NoReturn:
        if os.environ.get("HEADWATER_REQUIRE_CLIENTS"):
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)

    return report
