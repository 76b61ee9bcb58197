"""When and where to try a call again. Decides; the caller waits."""

import random
import time
from dataclasses import dataclass, field

from .errors import HeadwaterError

FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 60.0
JITTER = 0.25


@dataclass
class Attempts:
    """The attempts of one call over a ring of addresses: next address at once, and a pause after each full round.

    retries: attempts after the first. timeout: seconds for all of them together, pauses included, or None.
    """

    addresses: tuple[str, ...]
    first: int
    retries: int
    timeout: float | None
    made: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def address(self) -> str:
        """Where the current attempt goes."""
        return self.addresses[(self.first + self.made) % len(self.addresses)]

    @property
    def left_s(self) -> float | None:
        """Seconds until the deadline, not below 0, or None."""
        if self.timeout is None:
            return None
        return max(0.0, self.began + self.timeout - time.monotonic())

    def next(self, error: HeadwaterError) -> float | None:
        """Count a failed attempt; seconds to wait before the next, or None if there is none."""
        if not error.retryable or self.made >= self.retries:
            return None
        self.made += 1
        delay = 0.0 if self.made % len(self.addresses) else self._pause(error)
        return None if self.left_s is not None and delay >= self.left_s else delay

    def _pause(self, error: HeadwaterError) -> float:
        """What the server asks for, else a doubling time; at most a minute; spread, so that callers part."""
        rounds = self.made // len(self.addresses) - 1
        wanted = FIRST_DELAY_S * 2.0 ** min(rounds, 8) if error.retry_after_s is None else error.retry_after_s
        return min(wanted, LONGEST_DELAY_S) * (1 + random.random() * JITTER)
