"""One loop for the session, one scripted sampler on a fresh socket for each test, and the command to talk to it."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from client_theatre import ROOT, Headwater, ScriptedSampler, Theatre, command
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


@pytest.fixture
def environment(address: str) -> dict[str, str]:
    """Where the package and the sampler are."""
    path = os.pathsep.join(str(ROOT / part) for part in ("gen", "clients/python"))
    return {"PATH": os.environ["PATH"], "PYTHONPATH": path, "HEADWATER_ADDRESS": address, "PYTHONWARNINGS": "error"}


@pytest.fixture
def headwater(environment: dict[str, str], tmp_path: Path) -> Headwater:
    """Runs the command in an empty directory and waits."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments), env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=20, check=False
        )

    return run


@pytest.fixture
def in_process(environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of `headwater` for calls of main; gives the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("HEADWATER_ADDRESS", "GRPC_VERBOSITY"):
        monkeypatch.setenv(name, environment.get(name, "NONE"))
    return tmp_path
