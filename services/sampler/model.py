"""A model attached to a sampler: the shared pipeline, its gates, and the view of it that one request gets.

A request's view is a shallow copy of the pipeline with a scheduler and autoencoders of its own (views.py). Denoisers
and text encoders are shared modules with gates on them.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from services.sampler.binding import BoundComponent
from services.sampler.blocks import Speedup, blocks_of
from services.sampler.engine import Engine
from services.sampler.gates import Absent, BoundParam, Gate, arena_source, is_host_lookup, split
from services.sampler.guard import Guard
from services.sampler.memo import PromptMemo
from services.sampler.requests import Task
from services.sampler.tasks import Abilities
from services.sampler.tiling import switch_on
from services.sampler.traits import Traits
from services.sampler.views import unit_view, view_class

# Steps that a picture takes, about: what of a denoiser stays on the device saves so many copies, of an encoder one.
DENOISE_PASSES = 8
# Of a component, in one tensor that every sampler has for itself: more is worth a warning.
COPY_SHARE = 0.01

log = structlog.get_logger()


class AttachedModel:
    """Owns the modules and gates of one model. Build and use it under the baton."""

    def __init__(
        self,
        name: str,
        abilities: Abilities,
        components: list[BoundComponent],
        engine: Engine,
        gate_limit: int,
        speedups: Sequence[Speedup] = (),
        config: Path = Path(),
        work_bytes: int = 0,
    ) -> None:
        self.name = name
        self.config = config
        self.abilities = abilities
        self.components = components
        self.engine = engine
        self.memo = PromptMemo()
        self.units: dict[str, Gate] = {}
        self._absent = Absent(engine.transfer.device)
        self.pinned: list[Gate] = []
        self.gates: list[Gate] = []
        # Components whose arithmetic depends on how much scratch memory it gets: cuDNN's convolutions.
        self.convolving = {c.name for c in components if any(isinstance(m, _ConvNd) for m in c.module.modules())}
        for component in components:
            self._gate_component(component, gate_limit)
            tell_copies(name, component)
        classes = {task: type(pipeline) for task, pipeline in abilities.pipelines.items()}
        self._view_classes = {task: view_class(cls, engine.transfer.device) for task, cls in classes.items()}
        engine.settle()
        engine.transfer.attach(self.gates, work_bytes)
        for component in components:
            self._move_rest(component)
        if speedups:
            self._speed_up(speedups, config)
        self._install_hooks()
        self._guard = Guard((c.name, c.module) for c in components if c.name not in self.units)

    # ---- building

    def _gate_component(self, component: BoundComponent, limit: int) -> None:
        if hasattr(component.module, "decode"):
            # Buffers are read outside decode and encode too, as FLUX.2's statistics of latents are.
            buffers = {id(buffer) for buffer in component.module.buffers()}
            params = tuple(p for p in component.params if id(p.tensor) not in buffers)
            gate = Gate(component.name, "", component.module, component.arena, params)
            self.units[component.name] = gate
            self.gates.append(gate)
            self._pin(component, tuple(p for p in component.params if id(p.tensor) in buffers))
            return
        by_tensor = {id(p.tensor): p for p in component.params}
        packed = {id(p.tensor): sum(size for _, size in p.ranges) for p in component.params if p.packing}
        modules, left = split(component.module, limit, packed)
        self._pin(component, tuple(by_tensor[id(t)] for t in left if id(t) in by_tensor))
        for name, module in modules:
            tensors = itertools.chain(module.parameters(), module.buffers())
            params = tuple(by_tensor[id(t)] for t in tensors if id(t) in by_tensor)
            # Rows of a plain table lie on a CPU already; of a packed one only those that are asked for are unpacked.
            is_worth_it = self.engine.transfer.device.type == "cuda" or any(param.packing for param in params)
            host = is_worth_it and is_host_lookup(module)
            if params:
                passes = 1 if is_encoder(component.name) else DENOISE_PASSES
                self.gates.append(Gate(component.name, name, module, component.arena, params, host=host, passes=passes))

    def _pin(self, component: BoundComponent, params: tuple[BoundParam, ...]) -> None:
        """Have params stay on the device once they are there."""
        if params:
            self.pinned.append(Gate(component.name, "(stem)", component.module, component.arena, params, pinned=True))
            self.gates.append(self.pinned[-1])

    def _move_rest(self, component: BoundComponent) -> None:
        """What the arena does not hold (buffers, conversions) lives on the device for good."""
        inside = {id(p.tensor) for p in component.params}
        device = self.engine.transfer.device
        for tensor in itertools.chain(component.module.parameters(), component.module.buffers()):
            if id(tensor) not in inside and tensor.device != device:
                tensor.data = tensor.data.to(device)

    def _speed_up(self, speedups: Sequence[Speedup], config: Path) -> None:
        """Replace the forward of what denoisers and encoders repeat; `config` is the pipeline's folder."""
        for component in self.components:
            if component.name in self.units:
                continue
            gates, encodes = self.gates_of(component.name), is_encoder(component.name)
            blocks = blocks_of(component.module, config / component.name, gates)
            tell = log.info if blocks or encodes else log.warning  # a denoiser that is one gate has no blocks
            tell("blocks", model=self.name, component=component.name, blocks=len(blocks), gates=len(gates))
            for speedup in speedups:
                if speedup.for_encoders or not encodes:
                    speedup.take(blocks)

    def _install_hooks(self) -> None:
        for gate in self.gates:
            if gate.pinned or gate.component in self.units:
                continue
            gate.module.register_forward_pre_hook(functools.partial(stop_at, self.engine, gate))
            if gate.host:
                gate.module.register_forward_pre_hook(ids_to_host)
                gate.module.register_forward_hook(functools.partial(rows_to, self.engine.transfer.device, gate))

    # ---- one request

    def request_view(
        self, tiled_decode: bool = False, solver: str = "", schedule: str = "", task: Task | None = None
    ) -> Any:
        """The pipeline for one request: own scheduler, own autoencoder trees, shared everything else.

        tiled_decode: the autoencoder decodes in tiles; only where `Traits.can_tile`. solver, schedule: common names
        that `Traits.choices` has; "": the model's own. task: one that the model can do; None: of the folder's pipeline.
        """
        task = task or self.abilities.own
        pipeline = self.abilities.pipelines[task]
        view = copy.copy(pipeline)
        view.__class__ = self._view_classes[task]
        choices = self.abilities.traits[task].choices
        parts: dict[str, Any] = {"scheduler": choices.scheduler(pipeline.scheduler, solver, schedule)}
        for name, gate in self.units.items():
            parts[name] = unit_view(self.engine, gate, self._absent)
        if tiled_decode:
            switch_on(parts["vae"])  # this request's tree
        view.__dict__.update(parts)  # setattr would write them into the pipeline's config
        if hasattr(view, "encode_prompt"):
            # Siblings may encode the same words in other ways.
            whose = type(pipeline).__qualname__
            view.__dict__["encode_prompt"] = self.memo.wrap(view.encode_prompt, self._wait_for_encoder, whose)
        return view

    def _wait_for_encoder(self, start: Callable[[Callable[[], None]], None]) -> None:
        """Stand where prompts are encoded until another rider has encoded this one."""
        encoders = [gate for gate in self.gates if is_encoder(gate.component) and not gate.pinned]
        self.engine.stand_by(encoders[0], start, prepares=False)

    def bring_pinned(self) -> None:
        """Stop until what lies outside all other gates is there; a rider's first gates."""
        for gate in self.pinned:
            self.engine.arrive(gate)

    def mend(self) -> None:
        """After a request: shared modules are as before, or are made so."""
        changed = self._guard.mend()
        if changed:
            log.warning("a pipeline changed shared modules; restored", model=self.name, modules=changed[:5])

    def detach(self) -> None:
        """Let go of device memory and arenas. No rider may be under way on this model."""
        self.engine.settle()
        self.engine.forget(self.gates)
        self.engine.transfer.detach(self.gates)
        for component in self.components:
            component.arena.close()

    # ---- facts

    @property
    def pipeline(self) -> Any:
        """The folder's own."""
        return self.abilities.pipelines[self.abilities.own]

    @property
    def traits(self) -> Traits:
        """Those of the folder's own pipeline."""
        return self.abilities.traits[self.abilities.own]

    @property
    def size_bytes(self) -> int:
        return sum(c.arena.size_bytes for c in self.components)

    @property
    def ready_bytes(self) -> int:
        return sum(c.arena.ready_bytes for c in self.components)

    def gates_of(self, component: str) -> list[Gate]:
        return [gate for gate in self.gates if gate.component == component]

    def fill_order(self) -> list[tuple[str, list[int]]]:
        """(component, extents) in the order of a first request: what is pinned, encoders, denoiser, decoder."""

        def rank(gate: Gate) -> int:
            return 0 if gate.pinned else 3 if gate.component in self.units else 1 if is_encoder(gate.component) else 2

        order: list[tuple[str, list[int]]] = []
        seen: set[tuple[str, int]] = set()
        for gate in sorted(self.gates, key=rank):
            fresh = [e for e in gate.extents if (gate.component, e) not in seen]
            seen.update((gate.component, e) for e in fresh)
            if fresh:
                order.append((gate.component, fresh))
        return order


def tell_copies(model: str, component: BoundComponent) -> None:
    """Log what of a component each sampler has for itself; a warning if one tensor is much of it."""
    largest = max(component.outside, key=lambda outside: outside.size_bytes, default=None)
    if largest is None:
        return
    tell = log.warning if largest.size_bytes > COPY_SHARE * component.arena.size_bytes else log.info
    tell(
        "private copies", model=model, component=component.name, count=len(component.outside),
        size_bytes=sum(outside.size_bytes for outside in component.outside), largest=largest.name,
        largest_bytes=largest.size_bytes, reason=largest.reason,
    )  # fmt: skip


def is_encoder(component: str) -> bool:
    return "encoder" in component


def stop_at(engine: Engine, gate: Gate, module: nn.Module, args: object) -> None:
    engine.arrive(gate)


def ids_to_host(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (args[0].cpu(),)


def rows_to(
    device: torch.device, gate: Gate, module: nn.Module, args: tuple[torch.Tensor], rows: torch.Tensor
) -> torch.Tensor:
    """What was looked up on the host; if the table is packed, that was zeros, and the rows are unpacked now."""
    (table,) = gate.params
    if table.packing:
        rows = table.packing.rows(arena_source(gate.arena), args[0].flatten(), rows.shape[-1], rows.dtype).view_as(rows)
    return rows.to(device)
