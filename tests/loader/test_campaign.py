"""The short form of the kill campaign, and mistakes that it must find."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.loader.support import ROOT, environment


def campaign(*flags: str) -> dict[str, Any]:
    """A campaign's tally; in a mount namespace of its own, for it mounts a tmpfs."""
    command = ["unshare", "--map-root-user", "--mount", sys.executable, "-m", "tests.loader.campaign", *flags]
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert run.stdout, run.stderr
    tally: dict[str, Any] = json.loads(run.stdout)
    return tally


FOUND = ("wrong", "stuck", "leaked", "failed")


@pytest.mark.parametrize(
    ("flag", "blow"),
    [
        ("--loader-kills", "a killed loader"),
        ("--reader-kills", "a killed reader"),
        ("--stops", "a frozen loader"),
        ("--full", "a full tmpfs"),
    ],
)
def test_fifty_blows_leave_nothing_wrong(flag: str, blow: str) -> None:
    """No wrong byte, no caller that waits for ever, no memory that stays, no error that is not ours."""
    tally = campaign(flag, "50")

    assert {key: tally[key] for key in FOUND} == {key: [] for key in FOUND}
    assert tally["done"][blow] == 50
    if flag == "--full":
        assert tally["done"]["HostMemoryFull"] > 5


@pytest.mark.parametrize("mistake", ["size-only", "flag-first"])
def test_a_planted_mistake_is_found(mistake: str) -> None:
    """Arenas taken over by their size alone; READY before the data."""
    tally = campaign("--plant", mistake, "--loader-kills", "50")

    assert tally["wrong"]
