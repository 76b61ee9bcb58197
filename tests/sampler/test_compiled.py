"""Compiled arithmetic: a request's pixels are the same whoever else rides, whatever came before, in every replica."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from headwater_client import Client, InvalidRequest, Numerics, Result

from tests.stack import Process, Stack

# A gate for each block of the tiny Z-Image, as real sizes have it.
GATE_LIMIT = 400_000
SIZES = [(64, 64), (96, 64), (64, 64), (96, 64)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of compiled programs that replicas share."""
    return tmp_path_factory.mktemp("compiled")


def replica(stack: Stack, cache: Path, *flags: str) -> Process:
    return stack.sampler("--numerics", "compiled", "--compile-cache", str(cache), *flags, gate_limit=GATE_LIMIT)


@pytest.fixture(scope="module")
def compiled(stack: Stack, cache: Path) -> Process:
    return replica(stack, cache)


def drawn(sampler: Process, index: int) -> Result:
    """Request `index` of four, two of each size."""
    width, height = SIZES[index]
    with Client(sampler.addresses[0]) as client:
        return client.generate("a red fox", model="tiny", width=width, height=height, steps=2, seed=index, timeout=150)


@pytest.fixture(scope="module")
def together(compiled: Process) -> list[str]:
    """SHA-256 of four pictures that rode together, on a replica that had compiled nothing."""
    with ThreadPoolExecutor(4) as pool:
        return [result.images[0].sha256 for result in pool.map(lambda index: drawn(compiled, index), range(4))]


def test_riders_equal_alone(compiled: Process, together: list[str]) -> None:
    """Four requests of two sizes at once draw what each draws alone, and say how."""
    alone = [drawn(compiled, index) for index in range(4)]

    assert [result.images[0].sha256 for result in alone] == together
    assert len(set(together)) == 4
    assert alone[0].finished.numerics is Numerics.COMPILED
    assert alone[0].finished.parameters["numerics"] == "compiled"
    with Client(compiled.addresses[0]) as client:
        assert client.model("tiny").numerics is Numerics.COMPILED


def test_blocks_are_compiled_by_the_helper(compiled: Process, together: list[str]) -> None:
    """Two sizes need five programs (one of Z-Image's three kinds of block sees the prompt alone), made elsewhere."""
    log = compiled.log.read_text()

    assert "blocks=6" in log
    assert log.count("event=compiled ") == 5
    assert "could not compile" not in log


def test_restarted_replica(stack: Stack, cache: Path, together: list[str]) -> None:
    """Another replica over the same cache draws the same, other sizes first, and params streamed through slots."""
    ring = replica(stack, cache, "--test-ring")

    assert [drawn(ring, index).images[0].sha256 for index in (3, 2, 1, 0)] == together[::-1]


def test_fresh_cache(stack: Stack, tmp_path: Path, together: list[str]) -> None:
    """A replica that compiles everything anew, the sizes in another order, draws the same."""
    fresh = replica(stack, tmp_path / "cache")

    assert [drawn(fresh, index).images[0].sha256 for index in (1, 0)] == [together[1], together[0]]


def test_other_numerics_are_refused(compiled: Process, sampler_unix: str) -> None:
    """What a replica does not run with is refused by name, on either side."""
    for address, wanted in ((compiled.addresses[0], "eager"), (sampler_unix, "compiled")):
        with Client(address) as client, pytest.raises(InvalidRequest, match="numerics"):
            client.generate("a red fox", model="tiny", numerics=wanted)
