"""grpc.health.v1 for asyncio servers: NOT_SERVING until told otherwise, and watchers end when the server drains."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_Response = health_pb2.HealthCheckResponse
NOT_SERVING = _Response.NOT_SERVING
SERVING = _Response.SERVING


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """State of named services; "" is the whole server.

    The library's servicer keeps Watch open while a server drains, so that every stop would take its full grace.
    """

    def __init__(self, *services: str) -> None:
        self._states = dict.fromkeys(("", *services), NOT_SERVING)
        self._changed = asyncio.Condition()
        self._is_draining = False

    async def set(self, service: str, state: int) -> None:
        """Change one service's state; without effect once the server drains."""
        async with self._changed:
            if not self._is_draining:
                self._states[service] = state
                self._changed.notify_all()

    async def set_all(self, state: int) -> None:
        for service in list(self._states):
            await self.set(service, state)

    async def enter_graceful_shutdown(self) -> None:
        """NOT_SERVING for good; watchers hear it and their streams end."""
        await self.set_all(NOT_SERVING)
        async with self._changed:
            self._is_draining = True
            self._changed.notify_all()

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's name
        if request.service not in self._states:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return _Response(status=self._states[request.service])

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        sent = None
        while True:
            state = self._states.get(request.service, _Response.SERVICE_UNKNOWN)
            if state != sent:
                yield _Response(status=state)
                sent = state
            if self._is_draining and self._states.get(request.service, state) == sent:
                return
            async with self._changed:
                if not self._is_draining and self._states.get(request.service, state) == sent:
                    await self._changed.wait()
