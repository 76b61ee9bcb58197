"""One loop for the session, one scripted sampler on a fresh socket for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from client_theatre import ScriptedSampler, Theatre
from headwater_client import Client


@pytest.fixture(scope="session")
def theatre() -> Iterator[Theatre]:
    """The loop that servers and asyncio tests share."""
    theatre = Theatre()
    yield theatre
    theatre.close()


@pytest.fixture
def address(tmp_path: Path) -> str:
    """Where the sampler listens."""
    return f"unix:{tmp_path}/sampler.sock"


@pytest.fixture
def sampler(theatre: Theatre, address: str) -> Iterator[ScriptedSampler]:
    """A sampler that draws unless it is given other scripts."""
    sampler = ScriptedSampler()
    server, _ = theatre.serve(sampler, address)
    yield sampler
    theatre.stop(server)


@pytest.fixture
def client(sampler: ScriptedSampler, address: str) -> Iterator[Client]:
    """A blocking client of the sampler."""
    with Client(address) as client:
        yield client
