"""Mutated headers are read or refused; and the fuzzer sees what it is there for."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.params import gguf_header, safetensors_header
from services.params.checkpoint import read_checkpoint
from services.params.specs import Checkpoint
from tests.params import fuzz
from tests.params.fuzz import GOOD
from tests.stack import ROOT

COUNT = 200_000


@pytest.mark.parametrize("format_", GOOD)
def test_mutated_headers_are_read_or_refused(format_: str, tmp_path: Path) -> None:
    """In a process that may take 64 MiB more than it has, and two seconds for each."""
    command = [sys.executable, "-m", "tests.params.fuzz", format_, "--count", str(COUNT)]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT}/gen"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert run.stdout, run.stderr
    figures = json.loads(run.stdout)

    assert figures["findings"] == []
    assert figures["count"] == COUNT
    assert figures["read"] > 100  # not all is refused at the door


def test_a_planted_crash_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGUF reader that looks at bytes before it knows that they are there."""

    def reach(self: gguf_header._Cursor, end: int) -> None:
        self.raw += self._fetch(len(self.raw), end - len(self.raw))

    monkeypatch.setattr(gguf_header._Cursor, "reach", reach)
    outcome = fuzz.fuzz("gguf", 20_000, 0)

    assert outcome.findings


def test_a_planted_trust_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A safetensors reader that takes any sizes."""
    monkeypatch.setattr(safetensors_header, "_are_sizes", lambda value: isinstance(value, list))
    outcome = fuzz.fuzz("safetensors", 20_000, 0)

    assert outcome.findings


def test_a_planted_hang_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "HANG_S", 0.05)

    def read(path: Path) -> Checkpoint:
        if b"tokens" in path.read_bytes():
            time.sleep(60)
        return read_checkpoint(path)

    assert "longer than" in fuzz.fuzz("gguf", 1000, 0, read).findings[0]


def test_a_planted_overlap_is_found() -> None:
    """Tensors that lie one on the other, accepted."""

    def read(path: Path) -> Checkpoint:
        checkpoint = read_checkpoint(path)
        return Checkpoint(checkpoint.files, checkpoint.tensors * 2)

    assert "overlaps" in fuzz.fuzz("gguf", 5000, 0, read).findings[0]
