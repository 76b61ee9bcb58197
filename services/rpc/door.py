"""Who calls over a Unix socket: asked of the kernel when somebody connects, for gRPC hands no credentials to Python.

Callers connect to the door. It notes the peer's user (SO_PEERCRED) in the address of a connection of its own to the
socket behind it, in a folder that nobody else may enter, and passes bytes on. A call's `context.peer()` says it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import socket
import struct
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import structlog

from services.errors import NotAllowed

_BUFFER_BYTES = 1 << 16
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred of unix(7)

_log = structlog.get_logger()


class Guard:
    """Lets calls through by who makes them. users: uids beside the server's own and root."""

    def __init__(self, users: Collection[int] = ()) -> None:
        self._users = {0, os.geteuid(), *users}

    def __call__(self, peer: str) -> None:
        """Raises NotAllowed if `peer`, as `context.peer()` says it, came by a Unix socket and is none of the users."""
        if not peer.startswith("unix"):
            return  # a port is open to who can reach it
        found = re.fullmatch(r"unix-abstract:headwater/\d+/\d+/uid=(\d+)", peer)
        if found is None or int(found[1]) not in self._users:
            who = f"user {found[1]}" if found else "who does not come by the door"
            raise NotAllowed(f"{who} may not call here: see --allow-uid")


class Door:
    """Passes callers on to the server that listens `behind`. `close` it when that has stopped."""

    def __init__(self, behind: Path) -> None:
        self._behind = behind
        self._count = itertools.count()
        self._server: asyncio.Server | None = None
        self._callers: set[asyncio.Task[None]] = set()

    async def open(self, listening: socket.socket) -> None:
        """Let callers in by a bound socket."""
        self._server = await asyncio.start_unix_server(self._let_in, sock=listening, backlog=1024)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for caller in self._callers:
            caller.cancel()
        await asyncio.gather(*self._callers, return_exceptions=True)

    async def _let_in(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._callers.add(task)
        try:
            with suppress(OSError):  # either side may go at any time, and the other hears of it
                await self._pass_on(reader, writer)
        finally:
            self._callers.discard(task)
            writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, uid, _ = _CREDENTIALS.unpack(
            writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        inner.setblocking(False)
        inner.bind(f"\0headwater/{os.getpid()}/{next(self._count)}/uid={uid}")
        try:
            await asyncio.get_running_loop().sock_connect(inner, os.fspath(self._behind))
        except BaseException:
            inner.close()
            raise
        inner_reader, inner_writer = await asyncio.open_unix_connection(sock=inner)
        try:
            await asyncio.gather(_pump(reader, inner_writer), _pump(inner_reader, writer))
        finally:
            inner_writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(_BUFFER_BYTES):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()
