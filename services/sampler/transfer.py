"""How params get from the arena to where the arithmetic is.

`ArenaViews` serves a CPU: params are views of the arena, nothing moves. A device with memory of its own has a `Ring`
(ring.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch

from services.sampler.gates import Absent, BoundParam, Gate, arena_source
from services.sampler.packed.runs import Fetch


class Transfer(Protocol):
    """What the engine asks of a device. All but `bind_thread` is called by the holder of the baton only."""

    device: torch.device
    streamed_bytes: int  # copied to the device so far

    @property
    def way(self) -> str:
        """How bytes travel, for people."""
        ...

    @property
    def work_limit_bytes(self) -> int:
        """The most that `reserve` can give."""
        ...

    def bind_thread(self) -> None: ...
    def attach(self, gates: Sequence[Gate], work_bytes: int = 0) -> None:
        """Take gates on, with room for at least so much work. No gate may be open. Raises DeviceMemoryFull."""
        ...

    def detach(self, gates: Iterable[Gate]) -> None: ...
    def enter(self, gate: Gate) -> None: ...
    def leave(self, gate: Gate) -> None: ...
    def prefetch(self, gate: Gate, upcoming: Iterator[Gate]) -> None: ...
    def views(self, gate: Gate) -> tuple[torch.Tensor, ...]: ...
    def streamed_bytes_of(self, gate: Gate) -> int: ...
    def resident_bytes_of(self, gate: Gate) -> int: ...

    def reserve(self, work_bytes: int) -> None:
        """Leave room for so many bytes of work beside params. No gate may be open. Raises DeviceMemoryFull."""
        ...

    def review_budget(self) -> None:
        """Look how much of the budget the process takes elsewhere; takes milliseconds. No gate may be open."""
        ...

    def make_way(self) -> bool:
        """Keep nothing that can be streamed, for memory is short; False if there was no such thing. No gate open."""
        ...


class ArenaViews:
    """A CPU computes on the arena itself: params stay bound to their views, zero copies.

    What is packed there is unpacked into memory of its own while its gate is open.
    """

    way = "arena views"
    work_limit_bytes = 1 << 62
    device = torch.device("cpu")
    streamed_bytes = 0

    def __init__(self) -> None:
        self._absent = Absent(self.device)

    def bind_thread(self) -> None:
        pass

    def attach(self, gates: Sequence[Gate], work_bytes: int = 0) -> None:
        pass

    def detach(self, gates: Iterable[Gate]) -> None:
        pass

    def enter(self, gate: Gate) -> None:
        if gate.is_packed and not gate.host:
            for param, view in zip(gate.params, self.views(gate), strict=True):
                param.tensor.data = view

    def leave(self, gate: Gate) -> None:
        if gate.is_packed and not (gate.pinned or gate.host):
            for param in gate.params:
                param.tensor.data = self._absent.like(param.view) if param.packing else param.view

    def prefetch(self, gate: Gate, upcoming: Iterator[Gate]) -> None:
        pass

    def views(self, gate: Gate) -> tuple[torch.Tensor, ...]:
        if not gate.is_packed:
            return tuple(p.view for p in gate.params)
        source = arena_source(gate.arena)
        with torch.inference_mode(False):  # params outlive the request that first needed them
            return tuple(unpacked(param, source) for param in gate.params)

    def streamed_bytes_of(self, gate: Gate) -> int:
        return 0

    def resident_bytes_of(self, gate: Gate) -> int:
        return gate.size_bytes

    def reserve(self, work_bytes: int) -> None:
        pass

    def review_budget(self) -> None:
        pass

    def make_way(self) -> bool:
        return False


def unpacked(param: BoundParam, source: Fetch) -> torch.Tensor:
    """A param as it is computed with; `source` has its arena's bytes."""
    if not param.packing:
        return param.view
    return param.packing.unpack(source, torch.empty(param.view.shape, dtype=param.view.dtype))
