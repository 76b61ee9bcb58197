"""Where an arena's pages come from, as the kernel tells it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.params.arena import attach
from services.params.header import Header
from services.params.layout import place
from services.params.owned_arena import OwnedArena
from services.params.placement import ONLINE, Placement, online_nodes, parse_list, parse_placement
from services.params.specs import TensorSpec

GENERATION = "ab" * 16

needs_nodes = pytest.mark.skipif(not ONLINE.exists(), reason="needs a kernel with NUMA")


@pytest.fixture
def path() -> Iterator[Path]:
    path = Path(f"/dev/shm/headwater-test-{os.getpid()}-{time.monotonic_ns()}.arena")
    yield path
    path.unlink()


def policy_of(path: Path) -> tuple[str, int]:
    """What the kernel says of a file that this process maps: policy, and pages of it that were touched here."""
    lines = Path("/proc/self/numa_maps").read_text().splitlines()
    (line,) = (line for line in lines if path.name in line)
    return line.split()[1], sum(map(int, re.findall(r" N\d+=(\d+)", line)))


@needs_nodes
@pytest.mark.parametrize(
    ("text", "policy"), [("off", "default"), ("0", "prefer:0"), ("interleave", r"interleave:0(-\d+)?")]
)
def test_an_arena_has_the_policy_it_was_made_with(path: Path, text: str, policy: str) -> None:
    """For whoever maps it, and for the pages that are reserved as for those that a fill makes."""
    specs = [TensorSpec(f"t.{n}", "U8", (60_000,), 0, 0, 60_000) for n in range(3)]
    header = Header("transformer", GENERATION, "cd" * 16, "ef" * 16, place(specs, 65536))
    owned = OwnedArena.create(path, header, parse_placement(text))
    with owned.window(1) as memory:
        memory[:] = b"\1" * len(memory)
    owned.reserve()
    owned.close()

    with attach(path, GENERATION) as arena:
        sum(arena.data[::4096])
        said, page_count = policy_of(path)

    assert re.fullmatch(policy, said)
    assert page_count >= 3 * 15


@needs_nodes
def test_placing_makes_no_page(path: Path) -> None:
    """However large the file is. A node that is not there is refused."""
    with path.open("wb+") as file:
        file.truncate(1 << 40)
        Placement(online_nodes()[:1]).apply(file.fileno(), 1 << 40)
        with pytest.raises(OSError, match="Invalid argument"):
            Placement((1023,)).apply(file.fileno(), 1 << 40)

    assert path.stat().st_blocks == 0


def test_a_placement_is_one_word_or_a_list() -> None:
    assert parse_placement("off") is None
    assert parse_placement("interleave") == Placement(is_interleaved=True)
    assert parse_placement("1") == Placement((1,))
    assert parse_placement("0,2-3") == Placement((0, 2, 3))
    for bad in ("", "on", "-1", "1-", "3-2", "0,,1", "0-1024", "0x1"):
        with pytest.raises(ValueError):  # noqa: PT011 # int's own words for some
            parse_placement(bad)


def test_lists_are_read_as_the_kernel_writes_them() -> None:
    assert parse_list("0\n") == (0,)
    assert parse_list("0-1,8\n") == (0, 1, 8)
