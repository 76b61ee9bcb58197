"""Compiled arithmetic: the forward of blocks that a denoiser repeats, compiled once for each layout of arguments.

A block is a module with a gate in front of it. Its gate is a hook and stays outside of what is compiled; only the
instance's `forward` is replaced. A rider that comes to a block with a layout not seen before waits, without the baton,
until a helper process has compiled it into the cache folder; then it takes the program from there.
"""

from __future__ import annotations

import functools
import time
import types
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import structlog
import torch
from torch import nn
from torch._C._dynamo.eval_frame import reset_code
from torch._dynamo.utils import counters

from services.errors import UnsupportedModel
from services.sampler import compiling
from services.sampler.compile_worker import Job
from services.sampler.engine import Engine
from services.sampler.gates import Gate
from services.sampler.helper import Helper
from services.sampler.signatures import KERNEL_ALIGNMENT, Signature, aligned, is_portable, signature

log = structlog.get_logger()


@dataclass(eq=False, slots=True)
class Block:
    """A module whose forward is compiled, and what it takes to build one like it elsewhere."""

    gate: Gate
    component: type[nn.Module]
    config: Path  # folder of the component's config
    tensors: dict[str, Signature]
    kind: Signature  # equal for blocks that share programs
    number: int = 0  # of the kind: a short key, for it is looked up at every call

    def job(self, args: Signature, kwargs: Signature, device: torch.device) -> Job:
        return Job(
            config=str(self.config),
            class_module=self.component.__module__,
            class_name=self.component.__name__,
            block=self.gate.name,
            tensors=self.tensors,
            args=args,
            kwargs=kwargs,
            device=str(device),
            thread_count=torch.get_num_threads(),
        )


class Compiler:
    """Owns what was compiled and the helper process. Use it under the baton; close it when riders have ended."""

    def __init__(self, engine: Engine, helper: Helper) -> None:
        self._engine = engine
        self._helper = helper
        self._compiled: dict[type[nn.Module], Any] = {}
        self._kinds: dict[Signature, int] = {}
        self._cached: set[Signature] = set()  # the helper is done with these, well or not
        self._made: dict[CodeType, set[Signature]] = {}  # programs in this process, by the function they are of

    def take(self, component: nn.Module, config: Path, gates: Iterable[Gate]) -> int:
        """Compile the blocks among a denoiser's gates; returns how many. Before gates are hooked: waits are first."""
        chosen = repeated(gates)
        for gate in chosen:
            self._take(describe(gate, type(component), config))
        return len(chosen)

    def close(self) -> None:
        """End the helper process, whatever it does."""
        self._helper.close()

    def _take(self, block: Block) -> None:
        block.number = self._kinds.setdefault(block.kind, len(self._kinds))
        module = block.gate.module
        cls = type(module)
        if cls not in self._compiled:
            # The helper has compilers beside it; the sampler starts no processes for what comes from the cache.
            self._compiled[cls] = guarded(compiling.compiled(cls, compile_threads=1), cls)
        module.forward = types.MethodType(self._compiled[cls], module)
        module.register_forward_pre_hook(functools.partial(self._before, block), with_kwargs=True)

    def _before(
        self, block: Block, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Wait for the block's program, in front of its gate."""
        layout, options = signature(args), signature(kwargs)
        key = (block.number, layout, options)
        made = self._made.setdefault(type(module).forward.__code__, set())
        if key not in made:
            if key not in self._cached and is_portable(layout) and is_portable(options):
                job = block.job(layout, options, self._engine.transfer.device)
                self._engine.stand_by(block.gate, lambda done: self._helper.ask(key, job, done))
            self._cached.add(key)
            self._make_room(type(module).forward.__code__, made)
            made.add(key)
        return aligned(args), aligned(kwargs)

    def _make_room(self, code: CodeType, made: set[Signature]) -> None:
        """Drop a function's programs when there are too many; the cache folder still has them."""
        if len(made) >= compiling.PROGRAM_LIMIT:
            log.info("dropping compiled programs; they are taken from the cache again", count=len(made))
            reset_code(code)
            made.clear()


def repeated(gates: Iterable[Gate]) -> list[Gate]:
    """Gates whose module's class stands behind two of them or more; a torch layer alone gains nothing."""
    able = [gate for gate in gates if not gate.pinned and not gate.host and can_compile(gate)]
    counts = Counter(type(gate.module) for gate in able)
    return [gate for gate in able if counts[type(gate.module)] > 1]


def can_compile(gate: Gate) -> bool:
    # A program assumes aligned params and is shared by all blocks of a kind.
    is_torch_layer = type(gate.module).__module__.startswith("torch.")
    return not is_torch_layer and all(p.offset % KERNEL_ALIGNMENT == 0 for p in gate.params)


def describe(gate: Gate, component: type[nn.Module], config: Path) -> Block:
    """The block behind a gate. Its params may be unbound now: their layout is that of their arena views."""
    views = {id(p.tensor): p.view for p in gate.params}
    device = str(next((t.device for t in gate.module.parameters()), "cpu"))
    tensors: dict[str, Signature] = {}
    for name, tensor in (*gate.module.named_parameters(), *gate.module.named_buffers()):
        kind, dtype, shape, stride, _, is_inference = signature(views.get(id(tensor), tensor))
        tensors[name] = (kind, dtype, shape, stride, device, is_inference)
    cls = type(gate.module)
    kind = (f"{cls.__module__}.{cls.__qualname__}", *sorted(tensors.items()), *switches(gate.module))
    return Block(gate, component, config, tensors, kind)


def switches(module: nn.Module) -> list[Signature]:
    """Scalars on the module whose names its forward mentions: blocks that differ in one have different programs.

    Only a guess of how many programs there are: a wrong one costs a compile under the baton, never pixels.
    """
    mentioned = type(module).forward.__code__.co_names
    scalars = {name: signature(value) for name, value in vars(module).items() if name in mentioned}
    return sorted((name, *layout) for name, layout in scalars.items() if layout[0] == "value")


def guarded(program: Any, cls: type[nn.Module]) -> Any:
    """`program` with this project's settings in force, and its compile errors as ours."""

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        compiling.settle_thread()
        before, started = programs(), time.monotonic()
        try:
            result = program(self, *args, **kwargs)
        except compiling.COMPILE_ERRORS as error:
            log.warning("compiling failed", block=cls.__name__, reason=str(error)[:2000])
            raise UnsupportedModel(
                f"{cls.__name__} cannot be compiled ({type(error).__name__}): use a replica with --numerics eager"
            ) from error
        after = programs()
        if after.made > before.made:
            log.info("program made", block=cls.__name__, seconds=round(time.monotonic() - started, 3),
                     source="cache" if after.missed == before.missed else "compiled here")  # fmt: skip
        return result

    return forward


class Programs(NamedTuple):
    """How many programs this process has made so far, and how many of them were not in the cache."""

    made: int
    missed: int


def programs() -> Programs:
    return Programs(counters["stats"]["unique_graphs"], counters["inductor"]["fxgraph_cache_miss"])
