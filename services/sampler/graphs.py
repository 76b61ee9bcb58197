"""Launch-bound work: the kernels of a block recorded as a CUDA graph, and launched all at once from then on.

At small sizes a device waits for its host, which launches some sixty kernels for a block. A graph is one launch. It
reads and writes fixed addresses, so arguments are copied to where it reads them and results from where it writes.
Params lie in slots, of which there are few, and blocks of a kind lie in a slot in the same way: a handful of graphs
serves all of them. A resident block has its own.

A graph launches the kernels that the block's forward launched, so its results have the same bits. That is not taken on
trust: the first results that a block gets of a graph are compared with its forward's, and a kind of block whose results
differ is never replayed.
"""

from __future__ import annotations

import functools
import time
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakSet

import structlog
import torch

from services.errors import DeviceMemoryFull
from services.sampler.blocks import Block
from services.sampler.budget import GRAPHS_BYTES
from services.sampler.desk import Desk, fill, same_bits, twin
from services.sampler.faults import is_memory_full
from services.sampler.recorder import Recorder, Replay
from services.sampler.signatures import Signature, map_tensors, signature, tensors_in

GRAPH_LIMIT = 1024
# Layouts of arguments that are remembered; callers choose sizes, so there may be any number.
LAYOUT_LIMIT = 1024
# What a block works in, as a multiple of its arguments and results: six for Z-Image's.
WORK_FACTOR = 8
# Full is full for so long: then all are dropped, and those in use are recorded again.
CALM_S = 10.0

Place = tuple[int, ...]  # addresses of a block's params and buffers

log = structlog.get_logger()


class UnrecordableError(Exception):
    """A forward that a graph cannot stand for; says why."""


class Graph:
    """A replay, and the blocks that got from it what their forward gives."""

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.compared: WeakSet[Block] = WeakSet()


class Recording:
    """One layout of arguments of a kind of block: where its graphs read and write."""

    def __init__(self, desk: Desk, alignment: int, args: object, kwargs: object, result: object) -> None:
        self.graphs: dict[Place, Graph] = {}
        self._twin = functools.partial(twin, alignment=alignment)
        self._args, self._kwargs, self._result = desk.lay_out([args, kwargs, result])
        self._given = list(tensors_in([self._args, self._kwargs]))

    def fill(self, given: Iterable[torch.Tensor]) -> None:
        """Take arguments."""
        for still, fresh in zip(self._given, given, strict=True):
            fill(still, fresh)

    def run(self, forward: Callable[..., object]) -> None:
        """What is recorded: a forward on the arguments kept here."""
        result = forward(*self._args, **self._kwargs)
        for still, fresh in zip(tensors_in(self._result), tensors_in(result), strict=True):
            fill(still, fresh)

    def play(self, place: Place, given: Sequence[torch.Tensor]) -> object:
        """The result for these arguments, of the block whose params lie at `place`."""
        self.fill(given)
        self.graphs[place].replay()
        return map_tensors(lambda still: fill(self._twin(still), still), self._result)


class Graphs:
    """Replays blocks' forwards where that is possible. Use under the baton, on one stream.

    A layout of arguments is recorded when a block meets it for the second time: what comes once is not worth it.
    """

    for_encoders = True

    def __init__(
        self,
        device: torch.device,
        recorder: Recorder,
        limit_bytes: int = GRAPHS_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit_bytes = limit_bytes
        self.replay_count = 0
        self.failures = 0  # allocations that failed while something was recorded: no harm was done
        self._device = device
        self._recorder = recorder
        self._clock = clock
        self._desk = Desk(device, recorder.alignment)
        self._recordings: dict[Signature, Recording] = {}
        self._met: dict[Signature, WeakSet[Block]] = {}
        self._refused: set[str] = set()  # kinds of blocks
        self._full_s: float | None = None  # since when

    @property
    def graph_count(self) -> int:
        return sum(len(recording.graphs) for recording in list(self._recordings.values()))

    @property
    def held_bytes(self) -> int:
        """Device memory that recordings take."""
        return self._recorder.held_bytes + self.kept_bytes

    @property
    def kept_bytes(self) -> int:
        """What of it torch counts as allocated: arguments and results."""
        return self._desk.size_bytes

    def take(self, blocks: Sequence[Block]) -> None:
        """Record these blocks' forwards, as they are now, and replay them."""
        for block in blocks:
            block.module.forward = types.MethodType(self._recorded(block), block.module)

    def clear(self) -> None:
        """Forget all recordings; what is still in use is recorded again as it comes."""
        self._recordings.clear()
        self._recorder.drop()
        self._full_s = None

    def make_way(self) -> bool:
        """Give all memory back and record nothing for a while; False if there was nothing."""
        had_any = bool(self._recordings)
        self._desk = Desk(self._device, self._recorder.alignment)
        self.clear()
        self._full_s = self._clock()
        return had_any

    def _recorded(self, block: Block) -> Callable[..., object]:
        forward = block.module.forward
        tensors = [*block.module.parameters(), *block.module.buffers()]

        @functools.wraps(type(block.module).forward)
        def recorded(_: object, *args: Any, **kwargs: Any) -> object:
            return self._call(block, forward, tuple(t.data_ptr() for t in tensors), args, kwargs)

        return recorded

    def _call(
        self, block: Block, forward: Callable[..., object], place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> object:
        given = list(tensors_in([args, kwargs]))
        # Kernels are chosen by alignment too.
        offsets = tuple(t.data_ptr() % self._recorder.alignment for t in given)
        layout = (block.kind, signature(args), signature(kwargs), offsets)
        met = self._blocks_that_met(layout)
        recording = self._recordings.get(layout)
        if recording is not None and place in recording.graphs and block in recording.graphs[place].compared:
            self.replay_count += 1
            return recording.play(place, given)
        result = forward(*args, **kwargs)
        if block not in met:
            met.add(block)
        elif block.kind not in self._refused and self._may_record():
            self._record(layout, block, forward, place, (args, kwargs, result))
        return result

    def _blocks_that_met(self, layout: Signature) -> WeakSet[Block]:
        if layout not in self._met:
            if len(self._met) >= LAYOUT_LIMIT:
                self._met.clear()
                self.clear()
            self._met[layout] = WeakSet()
        return self._met[layout]

    def _may_record(self) -> bool:
        if self._full_s is not None:
            if self._clock() - self._full_s < CALM_S:
                return False
            self.clear()
        return True

    def _record(
        self, layout: Signature, block: Block, forward: Callable[..., object], place: Place, call: tuple[Any, Any, Any]
    ) -> None:
        """Record a call that was just made, and compare what a replay gives with its result."""
        failures = self._recorder.failures()
        try:
            self._record_and_compare(layout, block, forward, place, call)
        except Exception as error:  # the caller has its result, whatever went wrong here
            if is_memory_full(error) or self._recorder.failures() > failures:
                self._full_s = self._clock()
            else:  # it waits for the device, asks the host, or keeps something to itself
                self._refuse(block, str(error))
        self.failures += self._recorder.failures() - failures
        if not self._recordings:
            self._recorder.drop()
        elif self.held_bytes > self.limit_bytes or self.graph_count >= GRAPH_LIMIT:
            self._full_s = self._clock()

    def _record_and_compare(
        self, layout: Signature, block: Block, forward: Callable[..., object], place: Place, call: tuple[Any, Any, Any]
    ) -> None:
        args, kwargs, result = call
        given = list(tensors_in([args, kwargs]))
        recording = self._recordings.get(layout)
        if recording is None:
            recording = self._new_recording(args, kwargs, result)
            recording.fill(given)
            self._recorder.warm_up(functools.partial(recording.run, forward))
        if place not in recording.graphs:
            recording.graphs[place] = Graph(self._recorder.record(functools.partial(recording.run, forward)))
        compare(result, recording.play(place, given))
        recording.graphs[place].compared.add(block)
        self._recordings[layout] = recording

    def _new_recording(self, args: object, kwargs: object, result: object) -> Recording:
        if not all(map(is_plain, (args, kwargs, result))):
            raise UnrecordableError("an argument or result is no plain value")
        if any(t.device != self._device for t in tensors_in([args, kwargs, result])):
            # Numbers in host memory would be read once, when it is recorded.
            raise UnrecordableError("an argument or result lies in host memory")
        needs = self._desk.needs(tensors_in([args, kwargs, result]))
        size_bytes = sum(needs.values())
        work_bytes = max(self._recorder.held_bytes, WORK_FACTOR * size_bytes)
        if max(self._desk.size_bytes, size_bytes) + work_bytes > self.limit_bytes:
            raise DeviceMemoryFull("no room for this layout's graphs")
        if not self._desk.holds(needs):
            self.clear()  # they would read where nothing is written any more
            self._desk.grow(needs)
        return Recording(self._desk, self._recorder.alignment, args, kwargs, result)

    def _refuse(self, block: Block, reason: str) -> None:
        log.warning("launched kernel by kernel", block=type(block.module).__name__, reason=reason.partition("\n")[0])
        self._refused.add(block.kind)
        for layout in [layout for layout in self._recordings if layout[0] == block.kind]:
            del self._recordings[layout]


def is_plain(value: object) -> bool:
    """Whether `map_tensors` and `signature` see all of it."""
    if type(value) in (list, tuple):
        return all(map(is_plain, value))  # type: ignore[call-overload]
    if type(value) is dict:
        return all(map(is_plain, value.values()))
    return value is None or isinstance(value, torch.Tensor | bool | int | float | str)


def compare(result: object, replayed: object) -> None:
    """Raises UnrecordableError unless both are the same, bit for bit. Waits for the device."""
    same = signature(result) == signature(replayed)
    if not same or not all(map(same_bits, tensors_in(result), tensors_in(replayed))):
        raise UnrecordableError("a replay gave other numbers than the forward: it does more than launch kernels")
