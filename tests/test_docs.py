"""What the documentation says of tests is true: they exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "threat-model.md").read_text()
FAULTS = PAGE.partition("## Faults")[2].partition("\n## ")[0]


def functions_of(file: str) -> set[str]:
    """Names of the functions in a file."""
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize(("file", "test"), sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE))))
def test_a_test_that_the_threat_model_names_exists(file: str, test: str) -> None:
    assert test in functions_of(file)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:tests|bench|protos)/[\w/.]*)`", PAGE))))
def test_a_file_that_the_threat_model_names_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_every_fault_has_a_test_or_a_reason() -> None:
    """Forty-five rows, none left out; the last column names a test, or says why there is none."""
    rows = [line.strip("| ").split(" | ") for line in FAULTS.splitlines() if re.match(r"\| \d", line)]

    assert [int(row[0]) for row in rows] == list(range(1, 46))
    assert [row for row in rows if not re.search(r"`tests/[\w/]+\.py::test_\w+`|^no test: ", row[3])] == []
