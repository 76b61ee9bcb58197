"""Room on the device for pictures' work: made before a picture is drawn, measured while the first of its kind is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import structlog
import torch
from torch import nn

from services.errors import DeviceMemoryFull
from services.sampler.engine import Engine
from services.sampler.faults import failed_allocations
from services.sampler.gates import Gate
from services.sampler.graphs import Graphs
from services.sampler.work import Kind, Need, WorkMemory

log = structlog.get_logger()


class MemoryMeter:
    """Sees what one picture allocates on a CUDA device: it has the baton between `resume` and `pause`."""

    def __init__(self, device: torch.device, others_bytes: Callable[[], int]) -> None:
        self._device = device
        self._others_bytes = others_bytes  # allocated by others in its stretches: what graphs keep
        self.restart()

    def restart(self) -> None:
        """The picture is begun anew, with nothing allocated."""
        self.need = Need(0, 0)
        self._own_bytes = 0
        self.resume()

    def resume(self) -> None:
        self._before_bytes = torch.cuda.memory_allocated(self._device) - self._others_bytes()
        torch.cuda.reset_peak_memory_stats(self._device)

    def pause(self) -> None:
        others = self._others_bytes()
        peak = self._own_bytes + torch.cuda.max_memory_allocated(self._device) - others - self._before_bytes
        self._own_bytes += torch.cuda.memory_allocated(self._device) - others - self._before_bytes
        self.need |= Need(peak, max(self._own_bytes, 0))


class ShortageMeter:
    """Sees whether memory was short for one picture without anybody saying so: it has the baton between both calls.

    A library that cannot have the scratch memory it wants takes another algorithm, which gives other last bits (cuDNN
    does). Pixels must not depend on what happens to be free.
    """

    def __init__(self, failures: Callable[[], int]) -> None:
        self.was_short = False
        self._failures = failures
        self._before: int | None = None

    def resume(self) -> None:
        self._before = self._failures()

    def pause(self) -> None:
        if self._before is not None:
            self.was_short |= self._failures() > self._before
            self._before = None


class Door(Gate):
    """A gate without params, which a picture passes when there is room for its work."""

    def __init__(self, opens: Callable[[Door], bool]) -> None:
        nothing: Any = self  # no arena: a track of its own
        super().__init__("workspace", "door", nn.Identity(), nothing, (), pinned=True, host=True)
        self._opens = opens

    def is_ready(self) -> bool:
        return self._opens(self)


class Workspace:
    """Who works on the device now, and the room that the transfer leaves them. Use under the baton.

    A picture for which there is no room beside those at work waits for them, first come, first served.
    """

    def __init__(self, engine: Engine, memory: WorkMemory, graphs: Graphs | None = None) -> None:
        self._engine = engine
        self._graphs = graphs
        self._memory = memory
        self._working: list[Kind] = []
        self._waiting: dict[Door, Kind] = {}  # in the order of their coming
        self._known_bytes = 0  # the most that pictures of known needs had to have at once

    @contextmanager
    def room(self, kind: Kind, multiple_px: int, can_tile: bool = False) -> Iterator[MemoryMeter | None]:
        """Room for a picture; a meter if the needs of its kind are not known yet.

        Raises DeviceMemoryFull naming the size that would fit, and tiles if the model has them.
        """
        if self._memory.never_fits(kind, self._engine.transfer.work_limit_bytes):
            raise self.too_large(kind, multiple_px, can_tile)
        self._wait(kind)
        self._working.append(kind)
        try:
            self._make_room()
            meter = self._meter(kind)
            yield meter
            if meter is not None:
                meter.pause()
                self._memory.learn(kind, meter.need)
                log.info("work measured", model=kind.model, width_px=kind.width_px, height_px=kind.height_px,
                         peak_bytes=meter.need.peak_bytes, parked_bytes=meter.need.parked_bytes)  # fmt: skip
                # Its kernels have been loaded by now.
                self._engine.settle()
                self._engine.transfer.review_budget()
        finally:
            self._working.remove(kind)

    def least_bytes(self, kinds: Iterable[Kind]) -> int:
        """Room to leave when a model is attached: for those at work, and for a picture of any of `kinds` alone."""
        return max(self._memory.least_bytes(kinds), self._memory.room_bytes(self._working))

    def failures(self) -> int:
        """Allocations on the device that failed so far and may have changed what is computed."""
        count = failed_allocations(self._engine.transfer.device)
        return count - (self._graphs.failures if self._graphs is not None else 0)

    def make_way(self) -> bool:
        """Memory was short in spite of the plan: keep no graphs and no residents. False if there were none."""
        self._engine.settle()
        had_graphs = self._graphs is not None and self._graphs.make_way()
        return self._engine.transfer.make_way() or had_graphs

    def too_large(self, kind: Kind, multiple_px: int, can_tile: bool = False) -> DeviceMemoryFull:
        """What to say to who asked for more than there is room for."""
        room = self._engine.transfer.work_limit_bytes
        width, height = self._memory.largest(kind, room, multiple_px)
        remedy = f"the largest of this shape that fits is {width}x{height}" if width else "no size fits"
        tiles = "; with tiled_decode it may need less" if can_tile and not kind.tiled else ""
        return DeviceMemoryFull(
            f"{kind.width_px}x{kind.height_px} needs about {self._memory.need(kind).peak_bytes / 2**30:.2f} GiB beside "
            f"the model, of {room / 2**30:.2f} GiB: {remedy}{tiles}; or raise --max-vram"
        )

    def _wait(self, kind: Kind) -> None:
        door = Door(self._opens)
        self._waiting[door] = kind
        try:
            if not door.is_ready():  # else it would wait for its turn in vain
                self._engine.arrive(door)
        finally:
            del self._waiting[door]
            self._engine.forget([door])

    def _opens(self, door: Door) -> bool:
        if next(iter(self._waiting)) is not door:
            return False
        needed = self._memory.room_bytes([*self._working, self._waiting[door]])
        return not self._working or needed <= self._engine.transfer.work_limit_bytes

    def _make_room(self) -> None:
        needed = self._memory.room_bytes(self._working)
        if all(map(self._memory.is_known, self._working)):
            self._known_bytes = max(self._known_bytes, needed)
        self._engine.settle()
        self._engine.transfer.reserve(min(max(needed, self._known_bytes), self._engine.transfer.work_limit_bytes))

    def _meter(self, kind: Kind) -> MemoryMeter | None:
        device = self._engine.transfer.device
        if device.type != "cuda" or self._memory.is_known(kind):
            return None
        graphs = self._graphs
        return MemoryMeter(device, (lambda: graphs.kept_bytes) if graphs is not None else (lambda: 0))
