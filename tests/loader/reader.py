"""A process that maps an arena and holds its lease until it is killed, as a sampler does."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from services.params.arena import attach

if __name__ == "__main__":
    with attach(Path(sys.argv[1]), sys.argv[2]) as arena:
        print("mapped", flush=True)
        while True:
            sum(arena.data[::4096])
            time.sleep(0.001)
