"""What a request looks like while it runs, as plain values: one line for the request, one row for each picture."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from .events import Event, Finished, Image, Phase, Preview, Progress, Queued, Started

DONE = "done"


@dataclass
class Row:
    """One picture. total is None while nobody knows how long the phase takes; note is short, e.g. "0.41 s/step"."""

    index: int
    phase: str = ""
    done: float = 0
    total: float | None = None
    count: str = ""
    note: str = ""
    began_s: float = 0
    began_step: int = 0


class Board:
    """The heading and the rows; `clock` gives seconds and serves the rate only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.heading = "connecting"
        self.rows: dict[int, Row] = {}
        self._clock = clock

    def add(self, event: Event) -> None:
        """Take in what happened."""
        match event:
            case Queued():
                self.heading = _queued(event)
            case Started():
                self.heading = f"{event.model} on {event.replica}"
            case Progress():
                self._progress(event)
            case Image():
                self._done(event)
            case Finished():
                self.heading += f": {_cost(event)}"
            case Preview():
                pass

    def _row(self, index: int) -> Row:
        return self.rows.setdefault(index, Row(index))

    def _progress(self, event: Progress) -> None:
        row = self._row(event.image_index)
        if row.phase != event.phase:
            row.phase, row.note, row.count = event.phase, "", ""
            row.began_s, row.began_step = self._clock(), event.step
        if event.phase is Phase.DENOISING:
            self._step(row, event)
        elif event.total_bytes:
            row.done, row.total = event.ready_bytes, event.total_bytes
            row.count = f"{size(event.ready_bytes)} of {size(event.total_bytes)}"
        else:
            row.done, row.total = 0, None

    def _step(self, row: Row, event: Progress) -> None:
        row.done, row.total = event.step, event.step_count
        row.count = f"{event.step}/{event.step_count}"
        if event.step > row.began_step:
            pace_s = (self._clock() - row.began_s) / (event.step - row.began_step)
            row.note = f"{pace_s:.2f} s/step"

    def _done(self, event: Image) -> None:
        row = self._row(event.image_index)
        row.phase, row.done, row.total = DONE, 1, 1
        row.count = f"{event.width_px}x{event.height_px}"
        row.note = f"seed {event.seed}"


def _queued(event: Queued) -> str:
    wait = "" if event.estimate_s is None else f", about {event.estimate_s:.0f} s"
    return f"queued, {event.position} before this one{wait}"


def _cost(event: Finished) -> str:
    count = len(event.seeds)
    parts = [f"{count} picture{'s' if count != 1 else ''} in {event.run_time_s:.1f} s"]
    if event.queue_time_s >= 0.05:
        parts.append(f"queued {event.queue_time_s:.1f} s")
    if event.stall_time_s >= 0.05:
        parts.append(f"waited for params {event.stall_time_s:.1f} s")
    if event.streamed_bytes:
        parts.append(f"{size(event.streamed_bytes)} streamed")
    return ", ".join(parts)


def size(size_bytes: float) -> str:
    """E.g. "12.3 GB", in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 999.5 or unit == "GB":
            break
        size_bytes /= 1000
    return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
