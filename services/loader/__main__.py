"""The loader's command line: configure, lock the arena folder, serve until a signal, give all memory back."""

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import grpc
import structlog
from headwater.loader.v1 import loader_pb2_grpc

from services.loader import inspection, preflight, upkeep
from services.loader.arenas import ArenaDir
from services.loader.config import Config, Inspect, Upkeep, parse_args
from services.loader.entries import ConfigError, read_entries
from services.loader.fill import Filler
from services.loader.pressure import relieving
from services.loader.reload import Reload
from services.loader.service import SERVICE, LoaderService
from services.loader.store import ParamStore
from services.loader.telling import teller_for, telling
from services.rpc import logs
from services.rpc.door import Door, Guard
from services.rpc.server import (
    SERVING,
    add_health,
    add_reflection,
    bind,
    bind_door,
    build_server,
    release,
    run_until_signal,
)

_log = structlog.get_logger()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a loader, look after its folder, or look at files; 0 after a signal, 1 for what the operator has to mend."""
    try:
        config = parse_args(argv)
        if isinstance(config, Upkeep):
            return upkeep.run(config)
        if isinstance(config, Inspect):
            return inspection.run(config)
        logs.configure(config.log_format, config.log_level)
        asyncio.run(_serve(config))
    except ConfigError as error:
        print(f"headwater-loader: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except OSError as error:
        print(f"headwater-loader: {error.strerror or error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:  # before the server was up; all that was taken has been given back
        return 130
    return 0


async def _serve(config: Config) -> None:
    directory = ArenaDir.open(config.arena_dir, config.allow_disk, config.numa)
    try:
        server = build_server(admit=Guard(config.allowed_users))
        async with _listening(server, config.listen, directory.socket) as address:
            await _run(config, server, address, directory)
    finally:
        directory.close()


@asynccontextmanager
async def _listening(server: grpc.aio.Server, address: str, inner: Path) -> AsyncIterator[str]:
    """Be reached at `address`, by a door if it is a Unix socket: the server itself listens at `inner` then."""
    socket = bind_door(address)
    if socket is None:
        yield bind(server, address)
        return
    door = Door(inner)
    try:
        bind(server, f"unix:{inner}", mode=0o600)  # who gets past the door could say to be anybody
        await door.open(socket)
        yield address
    finally:
        await door.close()
        release(f"unix:{inner}")
        release(address)


async def _run(config: Config, server: grpc.aio.Server, address: str, directory: ArenaDir) -> None:
    filler = Filler(config.fill_threads, config.max_fill_rate, config.buffered_io)
    store = ParamStore(config.models, directory, filler, config.extent_bytes, config.host_budget_bytes)
    reload = Reload(partial(read_entries, config.models_file, config.added), store, config.eager_load)
    loader_pb2_grpc.add_LoaderServiceServicer_to_server(LoaderService(store, reload), server)
    health = add_health(server, SERVICE)
    add_reflection(server, SERVICE)
    try:
        preflight.check(config, directory.path, await store.scan())
        await store.adopt()
        await server.start()
        await health.set_all(SERVING)
        store.begin()  # the threads that verify would keep the start waiting
        _log.info("serving", address=address, models=len(config.models))
        eager = [asyncio.create_task(store.load_all())] if config.eager_load else []
        relief = relieving(store.give_back, config.pressure_limit_percent)
        with reload.on_signal():
            async with relief, telling(store.filling, teller_for(config.log_format)):
                await run_until_signal(server, health, config.grace_s, store.begin_stop, address)
        await asyncio.gather(*eager)
    finally:
        await store.stop()


if __name__ == "__main__":
    sys.exit(main())
