"""A sampler whose device is lost at a signal: the real program, with a transfer that fails from SIGUSR1 on.

Run as `python -m tests.sampler.faulty_sampler` with a sampler's flags.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Any

from services.sampler import __main__ as program
from services.sampler.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sampler's own main on a device that can be lost."""
    from services.sampler import server
    from tests.sampler.world import fault

    opened = server.open_device
    lost: list[int] = []

    def open_faulty(config: Config) -> Any:
        transfer, facts = opened(config)
        enter = transfer.enter

        def fail_or_enter(gate: Any) -> None:
            if lost:
                raise fault()
            enter(gate)

        transfer.enter = fail_or_enter  # type: ignore[method-assign]
        return transfer, facts

    server.open_device = open_faulty
    signal.signal(signal.SIGUSR1, lambda number, frame: lost.append(number))
    return program.main(argv)


if __name__ == "__main__":
    sys.exit(main())
