"""`python scripts/demo`: see show.py. Exit codes: 0 done, 1 failed, 130 stopped by a signal.

Start it with the stop signals blocked (`env --block-signal`, as the Makefile does), and one that comes while Python
itself starts is not lost either.
"""

import sys

from signals import StopFlag


def main() -> int:
    stop = StopFlag()
    from show import run  # imports take a moment, in which a signal may come

    code = run(stop)
    stop.close()
    return code


if __name__ == "__main__":
    sys.exit(main())
