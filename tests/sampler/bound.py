"""Components bound in the test's own process, from files as they circulate, and what their params are on arrival."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from services.params.arena import AttachedArena, attach
from services.params.checkpoint import joined, read_checkpoint
from services.params.header import Header
from services.params.layout import place
from services.params.owned_arena import OwnedArena
from services.sampler.binding import BoundComponent, bind
from services.sampler.gates import Gate, arena_bytes
from services.sampler.slots import new_slot
from services.sampler.transfer import ArenaViews

Tensors = dict[str, torch.Tensor]


@contextmanager
def arena_of(memory: Path, *files: Path) -> Iterator[AttachedArena]:
    """Files of one component as the loader lays them out, all READY."""
    checkpoint = joined([read_checkpoint(file) for file in files])
    header = Header("part", "ab" * 16, "cd" * 16, "ef" * 16, place(checkpoint.tensors))
    owned = OwnedArena.create(memory / "part.arena", header)
    owned.reserve()
    specs = {spec.name: spec for spec in checkpoint.tensors}
    for number, extent in enumerate(header.layout.extents):
        with owned.window(number) as window:
            for tensor in header.layout.tensors:
                if tensor.extent == number:
                    spec, at = specs[tensor.name], tensor.offset - extent.offset
                    with checkpoint.files[spec.file].path.open("rb") as file:
                        file.seek(spec.offset)
                        window[at : at + spec.size_bytes] = file.read(spec.size_bytes)
        owned.publish(number, bytes(16))
    try:
        with attach(owned.path, header.generation) as arena:
            yield arena
    finally:
        owned.unlink()
        owned.close()


@contextmanager
def bound(memory: Path, config: Path, library: str, cls: type[nn.Module], *files: Path) -> Iterator[BoundComponent]:
    """A component whose params are in `files` and whose config is in the folder `config`."""
    with arena_of(memory, *files) as arena:
        yield bind("part", (library, cls.__name__), config, arena)


def arrived(component: BoundComponent) -> Tensors:
    """Params and buffers by name, as they are computed with: on the arena, and the same in a slot."""
    gate = Gate("part", "", component.module, component.arena, component.params)
    source, slot = arena_bytes(component.arena), new_slot(torch.device("cpu"), gate.size_bytes, poison=True)
    for copy in gate.copies:
        slot.memory[copy.at : copy.at + copy.size_bytes] = source[copy.offset : copy.offset + copy.size_bytes]
    slot.unpack(gate)
    there = {}
    for param, view, other in zip(gate.params, ArenaViews().views(gate), slot.views(gate), strict=True):
        assert torch.equal(view.float(), other.float())
        there[id(param.tensor)] = view
    state: dict[str, Any] = component.module.state_dict(keep_vars=True)
    return {name: there.get(id(tensor), tensor.detach()) for name, tensor in state.items()}


def assert_equal(component: BoundComponent, reference: nn.Module) -> None:
    """All params of the bound component are the reference's, bit for bit and in its dtypes."""
    ours, theirs = arrived(component), reference.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def outside_share(component: BoundComponent) -> float:
    """Bytes of private copies, for each byte of the arena."""
    return sum(outside.size_bytes for outside in component.outside) / component.arena.size_bytes
