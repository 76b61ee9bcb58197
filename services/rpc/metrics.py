"""Numbers for Prometheus, read at the moment when they are asked for."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import Metric
from prometheus_client.registry import Collector


class _Reader(Collector):
    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._read()


@contextmanager
def serving_metrics(address: str, read: Callable[[], Iterable[Metric]]) -> Iterator[None]:
    """Answer HTTP at `host:port` with what `read` says, which is called in the server's threads.

    Serves nothing if the address is empty. Raises OSError with one clear sentence if it cannot be had.
    """
    if not address:
        yield
        return
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        raise OSError(errno.EINVAL, f"an address for metrics is host:port: {address}")
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Reader(read))
    try:
        server, thread = start_http_server(int(port), host or "0.0.0.0", registry)
    except OSError as error:
        raise OSError(error.errno, f"cannot serve metrics on {address}: {error.strerror}") from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
