"""Looks at an arena's state bytes in turn and at the data as soon as one says READY, on and on, as fast as it can.

    python -m tests.params.receiver PATH GENERATION

Extent n must hold `pattern(n)` everywhere. Says how many were seen so, after each, to whom fills them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from services.params.arena import attach


def pattern(extent: int) -> bytes:
    """One of 255 bytes, none of them a zero."""
    return bytes((1 + extent % 255,))


def main(path: str, generation: str) -> int:
    wrong = 0
    with attach(Path(path), generation) as arena:
        sys.stdout.write(".")
        sys.stdout.flush()
        for number, extent in enumerate(arena.extents):
            want = pattern(number) * extent.size_bytes
            while not arena.is_ready(number):
                pass
            wrong += bytes(arena.data[extent.offset : extent.offset + extent.size_bytes]) != want
            sys.stdout.write(".")
            sys.stdout.flush()
    return wrong


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
