"""Threads that are used again, the one used last first.

Libraries keep things by thread: cuBLAS its handle and scratch memory, cuDNN the plans of its attention, which take it
60 ms each to make for every shape. A request in a new thread would pay for all of them.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

IDLE_S = 60.0

Work = Callable[[], object]


class Threads:
    """As many threads as there is work at once; one that had nothing to do for `idle_s` seconds ends."""

    def __init__(self, name: str, idle_s: float = IDLE_S) -> None:
        self._name = name
        self._idle_s = idle_s
        self._mutex = threading.Lock()
        self._idle: list[queue.SimpleQueue[Work]] = []

    def start(self, work: Work) -> None:
        """Run `work` in a thread; returns at once. It must not raise."""
        with self._mutex:
            if self._idle:
                self._idle.pop().put(work)
                return
        threading.Thread(target=self._serve, args=(work,), name=self._name, daemon=True).start()

    def _serve(self, work: Work) -> None:
        box: queue.SimpleQueue[Work] = queue.SimpleQueue()
        while True:
            work()
            del work  # and what it holds
            with self._mutex:
                self._idle.append(box)
            try:
                work = box.get(timeout=self._idle_s)
            except queue.Empty:
                with self._mutex:
                    if box in self._idle:
                        self._idle.remove(box)
                        return
                work = box.get()  # it came in the last moment
