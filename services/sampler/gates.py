"""Where a forward stops to have its params brought in.

A *gate* stands in front of one module: the params of that module, all below it included, are on the device from the
moment the gate opens until the rider that passed it reaches its next gate. Gates are found from the bound modules, not
from names. This file knows torch modules and arenas; it knows nothing of riders or of how bytes travel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from services.params.arena import AttachedArena
from services.params.layout import ALIGNMENT, extents_in
from services.sampler.packed.runs import Fetch, Packed

# An embedding table above this is looked up on the host: a prompt needs a few of its rows.
HOST_LOOKUP_BYTES = 64 << 20
# What a gate may unpack to, over what may travel for it: one scratch holds it, while slots are three.
UNPACKED_SHARE = 2


@dataclass(eq=False, slots=True)
class BoundParam:
    """A parameter (or buffer) whose bytes lie in an arena.

    `view` has its shape, stride and dtype. It is the bytes as they lie in the arena, unless they are packed there: then
    it has no bytes.
    """

    tensor: torch.Tensor
    offset: int  # of its first byte in the arena's data
    size_bytes: int  # from there on
    view: torch.Tensor
    packing: Packed | None = None  # which bytes of the arena have to be unpacked, and how; None: it is as it lies there

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """(first byte, size) of each piece of the arena that it is made of."""
        return self.packing.ranges if self.packing else ((self.offset, self.size_bytes),)


@dataclass(frozen=True, slots=True)
class Copy:
    """One contiguous range: arena bytes [offset, offset + size_bytes) go to the slot at `at`."""

    offset: int
    size_bytes: int
    at: int


@dataclass(eq=False, slots=True)
class Gate:
    """The params in front of one module, and where their bytes are. Identity is the object."""

    component: str
    name: str
    module: nn.Module
    arena: AttachedArena
    params: tuple[BoundParam, ...]
    pinned: bool = False  # stays on the device once it is there
    host: bool = False  # an embedding table, looked up where it lies
    passes: int = 1  # how often a request passes it, roughly
    copies: tuple[Copy, ...] = ()
    size_bytes: int = 0  # of a slot that holds it
    scratch_bytes: int = 0  # beside the slot, for what is unpacked while the gate is open
    places: tuple[int, ...] = ()  # of each param as it is computed with: in the slot, or if unpacked in the scratch
    arrivals: tuple[int, ...] = ()  # of each param's bytes in the slot, as they come from the arena
    is_packed: bool = False  # whether some of it has to be unpacked
    extents: tuple[int, ...] = ()
    _waiting: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.copies, self.arrivals, self.size_bytes = lay_out(self.params)
        self.is_packed = any(param.packing for param in self.params)
        self.places, self.scratch_bytes = place_unpacked(self.params, self.arrivals)
        self.extents = tuple(
            sorted({e for p in self.params for at, n in p.ranges for e in extents_in(self.arena.extents, at, n)})
        )
        self._waiting = list(self.extents)

    def is_ready(self) -> bool:
        """Whether every byte is in the arena. One list check once it was true."""
        while self._waiting:
            if not self.arena.is_ready(self._waiting[-1]):
                return False
            self._waiting.pop()
        return True

    def arrived(self, memory: torch.Tensor, offset: int, size_bytes: int) -> torch.Tensor:
        """Bytes of the arena's data where the gate's copies put them in a slot's `memory`."""
        copy = next(c for c in self.copies if c.offset <= offset and offset + size_bytes <= c.offset + c.size_bytes)
        at = copy.at + offset - copy.offset
        return memory[at : at + size_bytes]

    def __repr__(self) -> str:
        return f"<gate {self.component}:{self.name} {self.size_bytes} bytes>"


def arena_bytes(arena: AttachedArena) -> torch.Tensor:
    """The arena's data as one uint8 tensor. Read-only memory: a write through it is a segmentation fault."""
    return torch.frombuffer(arena.data, dtype=torch.uint8)


def arena_source(arena: AttachedArena) -> Fetch:
    """Bytes of the arena where they lie."""
    data = arena_bytes(arena)
    return lambda offset, size_bytes: data[offset : offset + size_bytes]


class Absent:
    """What params are while they have no bytes: the shape and dtype that code may ask for, one NaN everywhere."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Made once: the driver may be busy page-locking, and lets nobody near the device for tens of milliseconds.
        self._nans: dict[torch.dtype, torch.Tensor] = {}

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False):
            if tensor.dtype not in self._nans:
                ones = torch.full((tensor.element_size(),), 0xFF, dtype=torch.uint8, device=self._device)
                self._nans[tensor.dtype] = ones.view(tensor.dtype)[0]  # no dimension: some buffers have none
            return self._nans[tensor.dtype].expand(tensor.shape)


def lay_out(params: tuple[BoundParam, ...]) -> tuple[tuple[Copy, ...], tuple[int, ...], int]:
    """Pack arena ranges into one slot: (copies, place of each param in the slot, bytes of the slot).

    Neighbours in the arena, alignment padding included, travel as one copy. Overlapping params (tied, or views of one
    fused tensor) share their bytes. Pure.
    """
    copies: list[Copy] = []
    for start, end in merge_ranges([(at, at + size) for p in params for at, size in p.ranges]):
        at = 0 if not copies else round_up(copies[-1].at + copies[-1].size_bytes)
        # The slot keeps the arena's alignment, so that a kernel sees the same address modulo ALIGNMENT everywhere.
        at += start % ALIGNMENT
        copies.append(Copy(start, end - start, at))
    places = tuple(next(c.at + p.offset - c.offset for c in copies if holds(c, p)) for p in params)
    return tuple(copies), places, round_up(copies[-1].at + copies[-1].size_bytes) if copies else 0


def place_unpacked(params: tuple[BoundParam, ...], arrivals: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Places in a scratch for what has to be unpacked; (`arrivals` with them, bytes of the scratch). Pure."""
    places, end = list(arrivals), 0
    for number, param in enumerate(params):
        if param.packing:
            places[number] = end
            end = round_up(end + param.view.numel() * param.view.element_size())
    return tuple(places), end


def merge_ranges(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted ranges, those less than the alignment apart joined."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start - merged[-1][1] < ALIGNMENT:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def holds(copy: Copy, param: BoundParam) -> bool:
    return copy.offset <= param.offset and param.offset + param.size_bytes <= copy.offset + copy.size_bytes


def round_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def split(
    root: nn.Module, limit_bytes: int, arena_bytes: Mapping[int, int] | None = None
) -> tuple[list[tuple[str, nn.Module]], list[torch.Tensor]]:
    """Modules to put gates in front of, in registration order, and the tensors that no such module holds.

    A module is split while it is larger than the limit or is a mere container, whose own forward nobody calls.
    What a split module owns directly is read outside its children's gates and must stay on the device.
    arena_bytes: of tensors that are packed there, by id; unpacked they may have UNPACKED_SHARE times the limit.
    """
    packed = arena_bytes or {}
    gated: list[tuple[str, nn.Module]] = []
    left: list[torch.Tensor] = []
    seen: set[int] = set()

    def visit(name: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        size = sum(t.numel() * t.element_size() for t in module.parameters())
        travels = sum(packed.get(id(t), t.numel() * t.element_size()) for t in module.parameters())
        fits = travels <= limit_bytes and size <= UNPACKED_SHARE * limit_bytes
        children = [(n, m) for n, m in module.named_children() if m is not None]
        container = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)
        if size and not container and (fits or not children):
            gated.append((name, module))
            return
        left.extend(own_tensors(module))
        for child_name, child in children:
            visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", root)
    return gated, left


def own_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers that belong to the module itself, not to its children."""
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def is_host_lookup(module: nn.Module) -> bool:
    """Whether only rows of the module's table are ever needed. Exact type: subclasses do more than look up."""
    return type(module) is nn.Embedding and module.weight.numel() * module.weight.element_size() > HOST_LOOKUP_BYTES
