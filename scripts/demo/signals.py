"""What Ctrl-C and SIGTERM do to the demo: they set a flag, and whoever waits looks at it.

No exception can then fall between the start of a process and the line that remembers it.
"""

import signal
import time

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TICK_S = 0.03


class StoppedError(Exception):
    """Somebody asked the demo to stop."""


class StopFlag:
    """Counts stop signals from its making on; also those that were blocked until then."""

    def __init__(self) -> None:
        self.count = 0
        for number in STOP_SIGNALS:
            signal.signal(number, self._take)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def check(self) -> None:
        """Raise StoppedError if there was a signal."""
        if self.count:
            raise StoppedError

    def tick(self) -> None:
        """Sleep a moment. Raises StoppedError."""
        self.check()
        time.sleep(_TICK_S)
        self.check()

    def close(self) -> None:
        """Take no more signals; for the last moments of the process."""
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def _take(self, number: int, frame: object) -> None:
        self.count += 1
