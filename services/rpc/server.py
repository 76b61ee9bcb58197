"""A gRPC server's life: options, health and reflection, the address it binds, and how it stops."""

import asyncio
import errno
import inspect
import os
import signal
import socket
import stat
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.rpc.health import NOT_SERVING, SERVING, Health
from services.rpc.status import StatusInterceptor

__all__ = [
    "NOT_SERVING",
    "SERVING",
    "Health",
    "add_health",
    "add_reflection",
    "bind",
    "build_server",
    "run_until_signal",
    "unless_signalled",
]

MAX_RECEIVE_BYTES = 4 << 20
_UNIX = "unix:"
_MAX_SOCKET_PATH_BYTES = 107

_log = structlog.get_logger()


def build_server(
    max_receive_bytes: int = MAX_RECEIVE_BYTES, admit: Callable[[str], None] = lambda peer: None
) -> grpc.aio.Server:
    """A server that maps exceptions to statuses, notices dead peers in 15 s, and shares its port with nobody.

    admit: see StatusInterceptor.
    """
    return grpc.aio.server(
        interceptors=[StatusInterceptor(admit)],
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", max_receive_bytes),
            # The defaults lose calls of a burst with a bare CANCELLED.
            ("grpc.server.max_pending_requests", 10_000),
            ("grpc.server.max_pending_requests_hard_limit", 10_000),
            *KEEPALIVE,
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ],
    )


# ping_timeout_ms is the one that counts: with keepalive_timeout_ms alone a frozen peer is noticed after a minute.
KEEPALIVE = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


def add_health(server: grpc.aio.Server, *services: str) -> Health:
    """Serve grpc.health.v1 for "" and `services` (full names), all NOT_SERVING until `Health.set`."""
    health = Health(*services)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    return health


def add_reflection(server: grpc.aio.Server, *services: str) -> None:
    """Serve reflection for `services` (full names), health and itself."""
    names = (*services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)


def bind(server: grpc.aio.Server, address: str, mode: int = 0o660) -> str:
    """Bind `unix:/path`, a file of `mode`, or `host:port` and return the address, a port 0 replaced by the one given.

    The socket file of a dead server is replaced. Raises OSError with one clear sentence if the address cannot be had.
    """
    if not address.startswith(_UNIX):
        return _bind_port(server, address)
    with _socket_file(address, mode):
        _add_port(server, address)
    return address


def bind_door(address: str) -> socket.socket | None:
    """A socket bound to `unix:/path` (mode 0660), for a Door to listen on; None for other addresses."""
    if not address.startswith(_UNIX):
        return None
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _socket_file(address, 0o660) as path:
            listening.bind(os.fspath(path))
    except BaseException:
        listening.close()
        raise
    return listening


@contextmanager
def _socket_file(address: str, mode: int) -> Iterator[Path]:
    """Where a socket may be bound inside the block: it gets `mode`. Raises OSError."""
    path = Path(address.removeprefix(_UNIX))
    if (length := len(os.fsencode(path))) > _MAX_SOCKET_PATH_BYTES:
        most = f"a socket's path has at most {_MAX_SOCKET_PATH_BYTES} bytes, this has {length}"
        raise OSError(errno.ENAMETOOLONG, f"{most}; choose a shorter --listen or --arena-dir: {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"the folder of the socket does not exist: {path.parent}")
    _clear_stale(path)
    before = os.umask(0o777 & ~mode)
    try:
        yield path
    finally:
        os.umask(before)
    path.chmod(mode)


async def run_until_signal(
    server: grpc.aio.Server,
    health: Health,
    grace_s: float,
    on_stop: Callable[[], Awaitable[None] | None] | None = None,
    address: str = "",
    stopped: asyncio.Event | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain: NOT_SERVING, `on_stop`, no new calls, running ones get `grace_s`.

    A second signal ends everything at once. `address`, if it is a socket file, is removed. Who sets `stopped` stops
    the server as a signal does.
    """
    stopped, hurried = stopped or asyncio.Event(), asyncio.Event()

    def signalled() -> None:
        (hurried if stopped.is_set() else stopped).set()

    with _handling(signalled):
        await stopped.wait()
        _log.info("stopping", grace_s=grace_s)
        drain = asyncio.create_task(_drain(server, health, grace_s, on_stop))
        hurry = asyncio.create_task(hurried.wait())
        await asyncio.wait({drain, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not drain.done():
            await server.stop(None)
            drain.cancel()
        with suppress(asyncio.CancelledError):
            await drain
    release(address)


async def unless_signalled(work: Coroutine[Any, Any, object]) -> bool:
    """Do what comes before serving; False if SIGTERM or SIGINT came, which cancels it. Raises what it raises."""
    task, signals = asyncio.ensure_future(work), asyncio.Event()

    def signalled() -> None:
        signals.set()
        task.cancel()

    with _handling(signalled):
        await asyncio.wait({task})
    if not task.cancelled():
        task.result()
    return not signals.is_set()


def release(address: str) -> None:
    """Remove the socket file of a server that has stopped; other addresses need nothing."""
    if address.startswith(_UNIX):
        Path(address.removeprefix(_UNIX)).unlink(missing_ok=True)


async def _drain(
    server: grpc.aio.Server, health: Health, grace_s: float, on_stop: Callable[[], Awaitable[None] | None] | None
) -> None:
    await health.enter_graceful_shutdown()
    result = on_stop() if on_stop else None
    if inspect.isawaitable(result):
        await result
    await server.stop(grace_s)


@contextmanager
def _handling(signalled: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _bind_port(server: grpc.aio.Server, address: str) -> str:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal():
        raise OSError(errno.EINVAL, f"an address is unix:/path or host:port: {address}")
    return f"{host}:{_add_port(server, address)}"


def _add_port(server: grpc.aio.Server, address: str) -> int:
    try:
        port = server.add_insecure_port(address)
    except RuntimeError:
        port = 0
    if not port:
        raise OSError(errno.EADDRINUSE, f"cannot listen on {address}: in use, or not an address of this machine")
    return port


def _clear_stale(path: Path) -> None:
    """gRPC would take a live server's socket away without a word."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, f"a file that is no socket stands at {path}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except OSError:  # full backlog, no permission: somebody is there
            pass
    raise OSError(errno.EADDRINUSE, f"a server is listening on {path}")
