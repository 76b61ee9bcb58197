"""READY comes after the data, for a reader that looks all the time; and one that trusts too early is seen."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from services.params.arena import ExtentState
from services.params.owned_arena import OwnedArena
from tests.params.receiver import pattern
from tests.params.test_arena import GENERATION, make_header
from tests.stack import ROOT

HANDOVERS = 10_000
CONTROL = 200
EXTENT_BYTES = 16 << 10


def hand_over(folder: Path, count: int, publish: Callable[[OwnedArena, int], None]) -> int:
    """How many extents of an arena a reader saw wrongly; each is handed over while it waits for that one."""
    arena = OwnedArena.create(folder / "t.arena", make_header(count, EXTENT_BYTES, EXTENT_BYTES))
    arena.reserve()
    command = [sys.executable, "-m", "tests.params.receiver", str(arena.path), GENERATION]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        for extent in range(count):
            assert reader.stdout.read(1) == b"."
            publish(arena, extent)
        assert reader.stdout.read(1) == b"."
        wrong = int(reader.stdout.read())
    arena.close()
    return wrong


def data_first(arena: OwnedArena, extent: int) -> None:
    with arena.window(extent) as window:
        window[:] = pattern(extent) * EXTENT_BYTES
    arena.publish(extent, bytes(16))


def flag_first(arena: OwnedArena, extent: int) -> None:
    arena._set_state(extent, ExtentState.READY)
    time.sleep(0.001)  # the reader gets its turn on a busy machine too
    data_first(arena, extent)


def test_ten_thousand_handovers_are_right(memory: Path) -> None:
    """Every byte is there when the state says so."""
    assert hand_over(memory, HANDOVERS, data_first) == 0


def test_a_flag_before_the_data_is_seen(memory: Path) -> None:
    """Else the test above would show nothing."""
    assert hand_over(memory, CONTROL, flag_first) > 0
