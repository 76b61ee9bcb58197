"""When and where a call is tried again, without a server."""

import pytest
from headwater_client import InvalidRequest, QueueFull, Unavailable
from headwater_client.attempts import JITTER, LONGEST_DELAY_S, Attempts


def test_the_next_address_is_asked_at_once_and_a_round_ends_in_a_pause() -> None:
    """Every address gets a turn before anybody waits, from whichever the call began with."""
    attempts = Attempts(("a", "b", "c"), first=1, retries=3, timeout=None)
    asked, pauses_s = [attempts.address], []
    while (pause_s := attempts.next(Unavailable("gone"))) is not None:
        asked.append(attempts.address)
        pauses_s.append(pause_s)

    assert asked == ["b", "c", "a", "b"]
    assert pauses_s[:2] == [0, 0]
    assert pauses_s[2] >= 0.2


def test_pauses_double_up_to_a_minute() -> None:
    """The growth is bounded, and so is the spread."""
    attempts = Attempts(("a",), first=0, retries=50, timeout=None)
    pauses_s = [attempts.next(Unavailable("gone")) or 0 for _ in range(50)]

    for number, pause_s in enumerate(pauses_s):
        bare_s = min(0.2 * 2 ** min(number, 8), LONGEST_DELAY_S)
        assert bare_s <= pause_s <= bare_s * (1 + JITTER)


@pytest.mark.parametrize(("asked_s", "least_s"), [(0.5, 0.5), (3.0, 3.0), (1e6, LONGEST_DELAY_S)])
def test_the_servers_delay_counts(asked_s: float, least_s: float) -> None:
    """Never earlier than asked, up to a minute."""
    attempts = Attempts(("a",), first=0, retries=1, timeout=None)
    pause_s = attempts.next(QueueFull("full", retry_after_s=asked_s))

    assert pause_s is not None
    assert least_s <= pause_s <= least_s * (1 + JITTER)


def test_there_is_an_end() -> None:
    """No attempts left, no time left, or nothing that time would mend."""
    assert Attempts(("a",), 0, retries=0, timeout=None).next(Unavailable("gone")) is None
    assert Attempts(("a",), 0, retries=9, timeout=0.1).next(Unavailable("gone")) is None
    assert Attempts(("a", "b"), 0, retries=9, timeout=None).next(InvalidRequest("no")) is None
