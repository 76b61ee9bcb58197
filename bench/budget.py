"""Three models in a budget for two, used at random: is it kept, is what is leased spared, are all bytes right.

    python bench/budget.py --seconds 60

Readers in processes of their own prepare a model, lease its arenas, compare every byte with safetensors' own reading,
hold it for a moment and let go; another looks at the arena folder all the time. A refusal is right where two other
models are leased: the reader asks again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "gen")]

from bench.common import Figures, pick_device, report, table
from tests.loader.rotation import rotate
from tests.loader.support import workbench


def measure(seconds: float, seed: int, width: int, readers: int) -> Figures:
    with tempfile.TemporaryDirectory() as disk, workbench(Path(disk)) as bench:
        seen = rotate(bench, seconds, seed, width, readers)
    verdict = {
        "budget_kept": seen["peak_bytes"] <= seen["budget_bytes"],
        "leases_kept": seen["lost_leases"] == 0,
        "bytes_right": seen["wrong_bytes"] == 0,
    }
    return {"seconds": seconds, "seed": seed, "readers": readers} | seen | verdict


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="of random use (default: 60; tiny: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", type=int, default=3)
    parser.add_argument("--width", type=int, default=1024, help="of the models' square weights: 1024 is 36 MiB a model")
    parser.add_argument("--tiny", action="store_true", help="models of 150 KiB, to try the code")
    options = parser.parse_args(arguments)
    seconds = options.seconds or (2 if options.tiny else 60)
    figures = measure(seconds, options.seed, 64 if options.tiny else options.width, options.readers)
    table("three models in a budget for two", ("", ""), list(figures.items()))
    report("budget", pick_device(), figures)


if __name__ == "__main__":
    main()
