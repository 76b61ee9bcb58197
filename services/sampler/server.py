"""Puts a sampler together and serves it: device, engine, library, gRPC. Imported late, for it imports torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager, suppress

import grpc
import structlog
from headwater.sampler.v1 import sampler_pb2_grpc

from services.errors import DeviceGone, HeadwaterError, UnsupportedModel
from services.rpc.loader_client import LoaderClient
from services.rpc.metrics import serving_metrics
from services.rpc.server import (
    NOT_SERVING,
    SERVING,
    Health,
    add_health,
    add_reflection,
    bind,
    build_server,
    release,
    run_until_signal,
    unless_signalled,
)
from services.sampler import compiling
from services.sampler.admission import Admission
from services.sampler.attaching import Attacher
from services.sampler.budget import GIB
from services.sampler.classes import check_libraries
from services.sampler.compiler import Compiler
from services.sampler.config import Config, ConfigError
from services.sampler.device import open_device, open_graphs, tile_rule
from services.sampler.engine import Engine
from services.sampler.helper import Helper
from services.sampler.library import Library
from services.sampler.meter import open_meter
from services.sampler.metrics import numbers
from services.sampler.requests import Numerics
from services.sampler.sampler import Sampler
from services.sampler.service import SERVICE, SamplerService
from services.sampler.work import WorkMemory
from services.sampler.workspace import Workspace

# Three reference images and a mask of 16 MiB each, and everything else.
MAX_REQUEST_BYTES = 65 << 20

log = structlog.get_logger()


async def serve(config: Config) -> None:
    """Serve until a signal. Raises ConfigError, OSError before anything is served, DeviceGone after it was."""
    try:
        check_libraries()
    except UnsupportedModel as error:
        raise ConfigError(str(error)) from error
    transfer, facts = open_device(config)
    engine = Engine(transfer, open_meter(facts.device))
    server = build_server(MAX_REQUEST_BYTES)
    addresses: list[str] = []
    try:
        for address in config.listen:
            addresses.append(bind(server, address))
        async with LoaderClient(config.loader) as loader:
            with open_compiler(config, engine) as compiler:
                graphs = open_graphs(facts)
                speedups = [speedup for speedup in (compiler, graphs) if speedup is not None]
                workspace = Workspace(engine, WorkMemory(round(config.work_reserve_gib * GIB)), graphs)
                attacher = Attacher(
                    loader, engine, workspace, config.arena_dir, config.gate_limit_bytes, config.name, speedups
                )
                library = Library(loader, engine, attacher, config.name, kept=config.attach)
                admission = Admission(config.rider_limit, config.queue_limit)
                sampler = Sampler(library, engine, workspace, admission, tile_rule(config, facts.device))
                service = SamplerService(sampler, config.name, facts, config.numerics)
                sampler_pb2_grpc.add_SamplerServiceServicer_to_server(service, server)
                with serving_metrics(config.metrics, lambda: numbers(sampler, facts, graphs)):
                    async with letting_go(sampler):
                        if await unless_signalled(attach_first(library, config.attach)):
                            log.info("serving", addresses=addresses, device=str(facts.device), transfer=transfer.way,
                                     budget_bytes=facts.budget_bytes, numerics=config.numerics.value)  # fmt: skip
                            await run(server, sampler, service, config.grace_s)
    finally:
        for address in addresses:
            release(address)


@contextmanager
def open_compiler(config: Config, engine: Engine) -> Iterator[Compiler | None]:
    """The compiler, if this replica computes with compiled blocks. Raises ConfigError."""
    if config.numerics is Numerics.EAGER:
        yield None
        return
    try:
        cache = config.compile_cache.expanduser()
        compiling.use_cache(cache)
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        raise ConfigError(f"--compile-cache {config.compile_cache}: {error}") from error
    with closing(Compiler(engine, Helper(cache))) as compiler:
        yield compiler


@asynccontextmanager
async def letting_go(sampler: Sampler) -> AsyncGenerator[None, None]:
    """Detach the models at the end of the block, if the device is not lost."""
    try:
        yield
    finally:
        if sampler.engine.gone is None:  # else nothing can be let go in order: the kernel will
            await sampler.close()


async def attach_first(library: Library, names: Sequence[str]) -> None:
    """Attach models before anything is served. Raises ConfigError saying what the operator has to mend, DeviceGone."""
    for name in names:
        try:
            await library.attach_patiently(name)
        except DeviceGone:
            raise
        except HeadwaterError as error:
            raise ConfigError(f"--attach {name}: {error}") from error


async def run(server: grpc.aio.Server, sampler: Sampler, service: SamplerService, grace_s: float) -> None:
    """Serve; healthy while the loader answers or a model is attached that needs it no more.

    Raises DeviceGone if the device was lost, after the running calls were told so.
    """
    health = add_health(server, SERVICE)
    add_reflection(server, SERVICE)
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    sampler.engine.on_gone = lambda: loop.call_soon_threadsafe(stopped.set)
    await server.start()
    await health.set("", SERVING)
    if sampler.library.attached:
        await health.set(SERVICE, SERVING)
    watch = asyncio.create_task(sampler.library.watch(lambda connected: show_health(health, sampler, connected)))
    try:
        await run_until_signal(server, health, grace_s, service.drain, stopped=stopped)
    finally:
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
    if sampler.engine.gone is not None:
        raise sampler.engine.gone


def show_health(health: Health, sampler: Sampler, connected: bool) -> None:
    able = connected or bool(sampler.library.attached)
    # The health servicer notifies watchers, which takes a turn of the loop.
    sampler.spawn(asyncio.ensure_future(health.set(SERVICE, SERVING if able else NOT_SERVING)))
