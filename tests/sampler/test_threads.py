"""Threads are used again, and end when they are not."""

from __future__ import annotations

import threading
import time
from collections import Counter

from services.sampler.threads import Threads


def test_the_thread_used_last_is_used_again() -> None:
    threads, names, done = Threads("worker"), list[int](), threading.Event()

    def note() -> None:
        names.append(threading.get_ident())
        done.set()

    for _ in range(5):
        done.clear()
        threads.start(note)
        done.wait(10)
        while not threads._idle:  # it has said so, and puts itself back right after
            time.sleep(0.001)

    assert len(set(names)) == 1


def test_as_many_as_there_is_work_at_once_and_none_when_idle() -> None:
    """Work that comes as a thread's time runs out is done too."""
    threads, counts, together = Threads("passing", idle_s=0.01), Counter[int](), threading.Barrier(4)

    def meet() -> None:
        together.wait(10)
        counts[0] += 1

    for _ in range(4):
        threads.start(meet)
    while counts[0] < 4:
        time.sleep(0.001)
    for n in range(200):
        threads.start(lambda: counts.update([1]))
        time.sleep(0.0001 * (n % 130))
    while counts[1] < 200:
        time.sleep(0.001)
    deadline = time.monotonic() + 10
    while any(thread.name == "passing" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
