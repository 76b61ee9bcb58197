"""Files of tests/abuse: each is refused in plain words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from services.errors import BadCheckpoint
from services.params.checkpoint import read_checkpoint
from tests.params.alone import FILES
from tests.stack import ROOT


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind, files in FILES.items() for case in files])
def test_abuse_is_refused_in_plain_words(kind: str, case: str, tmp_path: Path) -> None:
    """BadCheckpoint that says what is wrong, and names the file but no folder."""
    raw, words = FILES[kind][case]
    path = tmp_path / f"model.{kind}"
    path.write_bytes(raw)

    with pytest.raises(BadCheckpoint) as caught:
        read_checkpoint(path)

    assert words in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_abuse_is_refused_in_little_memory() -> None:
    """Each file in a process of its own, which may take 64 MiB more than it has and is killed if it hangs."""
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT}/gen"}
    command = [sys.executable, "-m", "tests.params.alone"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert run.stdout, run.stderr
    outcomes = json.loads(run.stdout)

    assert len(outcomes) == sum(len(files) for files in FILES.values())
    assert [outcome for outcome in outcomes if outcome["end"] != "refused"] == []
