"""What hostile checkpoint files cost: each of tests/abuse is read in a process of its own, and refused.

    python bench/abuse.py

Time and peak of resident memory beyond what the process had, the median of some rounds for each file; the worst files.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "gen")]

from bench.common import ROOT, Figures, pick_device, report, table

LIMIT_MS, LIMIT_BYTES = 50.0, 64 << 20
WORST = 5


def one_round() -> list[Figures]:
    command = [sys.executable, "-m", "tests.params.alone"]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT}/gen"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    found: list[Figures] = json.loads(run.stdout)
    return found


def medians(rounds: list[list[Figures]]) -> list[dict[str, Any]]:
    """A row for each file."""
    rows = []
    for outcomes in zip(*rounds, strict=True):
        figures: dict[str, Any] = {key: outcomes[0][key] for key in ("format", "case")}
        figures["refused"] = all(outcome["end"] == "refused" for outcome in outcomes)
        figures |= {key: statistics.median(o[key] for o in outcomes) for key in ("ms", "peak_bytes")}  # type: ignore[type-var]
        rows.append(figures)
    return rows


def worst(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    top = sorted(rows, key=lambda row: -row[key])[:WORST]
    table(f"the most {key}", list(top[0]), [list(row.values()) for row in top])
    return top


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="one round, to try the code")
    options = parser.parse_args(arguments)
    rows = medians([one_round() for _ in range(1 if options.tiny else options.rounds)])
    figures: Figures = {"files": len(rows), "all_refused": all(row["refused"] for row in rows)}
    figures |= {"slowest": worst(rows, "ms"), "largest": worst(rows, "peak_bytes")}
    figures["over_time"] = [row["case"] for row in rows if row["ms"] > LIMIT_MS]
    figures["over_memory"] = [row["case"] for row in rows if row["peak_bytes"] > LIMIT_BYTES]
    report("abuse", pick_device(), figures)


if __name__ == "__main__":
    main()
