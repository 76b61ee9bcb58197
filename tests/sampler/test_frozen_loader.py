"""A loader that stands still under a sampler."""

from __future__ import annotations

import os
import signal

from tests.sampler.support import draw
from tests.stack import Stack


def test_a_frozen_loader_is_not_missed(own: Stack) -> None:
    """What is attached draws the same as before."""
    loader = own.loader("--eager-load")
    address = own.sampler().addresses[0]
    before = draw(address)
    os.kill(loader.pid, signal.SIGSTOP)
    try:
        assert draw(address) == before
    finally:
        os.kill(loader.pid, signal.SIGCONT)
