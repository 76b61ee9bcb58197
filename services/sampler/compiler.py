"""Compiled arithmetic: the forward of blocks that a denoiser repeats, compiled once for each layout of arguments.

Only the instance's `forward` is replaced. A rider that comes to a block with a layout not seen before waits, without
the baton, until a helper process has compiled it into the cache folder, unless one did so before; then it takes the
program from there.
"""

from __future__ import annotations

import functools
import time
import types
from collections.abc import Sequence
from types import CodeType
from typing import Any, NamedTuple

import structlog
import torch
from torch import nn
from torch._C._dynamo.eval_frame import reset_code
from torch._dynamo.utils import counters

from services.errors import UnsupportedModel
from services.sampler import compiling
from services.sampler.blocks import Block
from services.sampler.engine import Engine
from services.sampler.helper import Helper
from services.sampler.job import Job
from services.sampler.signatures import Signature, aligned, is_portable, signature

log = structlog.get_logger()


class Compiler:
    """Owns what was compiled and the helper process. Use it under the baton; close it when riders have ended."""

    for_encoders = False

    def __init__(self, engine: Engine, helper: Helper) -> None:
        self._engine = engine
        self._helper = helper
        self._compiled: dict[type[nn.Module], Any] = {}
        self._cached: set[Signature] = set()  # the helper is done with these, well or not
        self._made: dict[CodeType, set[Signature]] = {}  # programs in this process, by the function they are of

    def take(self, blocks: Sequence[Block]) -> None:
        """Compile these blocks as they are called. Before gates are hooked: waits are first."""
        for block in blocks:
            self._take(block)

    def close(self) -> None:
        """End the helper process, whatever it does."""
        self._helper.close()

    def _take(self, block: Block) -> None:
        module = block.module
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
        key = (block.kind, layout, options)
        made = self._made.setdefault(type(module).forward.__code__, set())
        if key not in made:
            if key not in self._cached and is_portable(layout) and is_portable(options):
                job = job_of(block, layout, options, self._engine.transfer.device)
                if not self._helper.has_done(job):
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


def job_of(block: Block, args: Signature, kwargs: Signature, device: torch.device) -> Job:
    """What the helper needs to compile a block's forward for this layout of arguments."""
    return Job(
        config=str(block.config),
        class_module=block.component.__module__,
        class_name=block.component.__name__,
        block=block.gate.name,
        kind=block.kind,
        tensors=block.tensors,
        args=args,
        kwargs=kwargs,
        device=str(device),
        thread_count=torch.get_num_threads(),
    )


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
