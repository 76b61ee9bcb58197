"""A model attached in the test's own process, on any transfer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from services.params.arena import attach
from services.rpc.loader_client import LoaderClient, LoaderModel
from services.sampler.binding import build_pipeline
from services.sampler.blocks import Speedup
from services.sampler.engine import Engine
from services.sampler.meter import open_meter
from services.sampler.model import AttachedModel
from services.sampler.riders import Rider
from services.sampler.tasks import abilities_of
from services.sampler.transfer import Transfer
from tests.stack import Stack

T = TypeVar("T")


def under_baton(engine: Engine, work: Callable[[], T]) -> T:
    """Run `work` as a rider; its value, or what it raised."""
    done: Future[None] = Future()
    rider = Rider(lambda rider: work(), lambda rider: done.set_result(None))
    engine.ride(rider)
    done.result(120)
    if rider.error is not None:
        raise rider.error
    return rider.result  # type: ignore[return-value] # `work`'s own type


def prepared(stack: Stack, name: str) -> LoaderModel:
    """The loader's word on a model, all of it READY."""

    async def wait() -> LoaderModel:
        async with LoaderClient(stack.loader_address) as client:
            return [news async for news in client.prepare(name)][-1].model

    return asyncio.run(wait())


@contextmanager
def attached(
    stack: Stack,
    name: str,
    transfer: Transfer,
    gate_limit: int = 8192,
    speedups_of: Callable[[Engine], Sequence[Speedup]] = lambda engine: (),
) -> Iterator[AttachedModel]:
    """The model on an engine of its own, leased for the time of the block."""
    known = prepared(stack, name)
    engine = Engine(transfer, open_meter(transfer.device))
    speedups = speedups_of(engine)
    config = stack.arena_dir / known.config
    with ExitStack() as leases:
        arenas = {
            c.name: leases.enter_context(attach(stack.arena_dir / c.arena, c.generation)) for c in known.components
        }

        def build() -> AttachedModel:
            pipeline, components = build_pipeline(config, arenas)
            abilities = abilities_of(pipeline, config)
            return AttachedModel(name, abilities, components, engine, gate_limit, speedups, config)

        yield under_baton(engine, build)
