"""Reads models.toml again while the loader serves: for a caller, or for SIGHUP."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress

import structlog

from services.errors import BadConfig, HeadwaterError
from services.loader.entries import ConfigError, ModelEntry
from services.loader.models import Reloaded
from services.loader.store import ParamStore

_log = structlog.get_logger()


class Reload:
    """Call it to have the store take over what `read_entries` gives now, which raises ConfigError.

    eager: fill what is new at once.
    """

    def __init__(self, read_entries: Callable[[], tuple[ModelEntry, ...]], store: ParamStore, eager: bool) -> None:
        self._read_entries = read_entries
        self._store = store
        self._eager = eager
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self) -> Reloaded:
        """Raises BadConfig, with nothing changed."""
        try:
            entries = await asyncio.to_thread(self._read_entries)
        except ConfigError as error:
            _log.error("models.toml cannot be used, nothing was changed", reason=str(error))
            text = "models.toml cannot be used, nothing was changed: the loader's log says why"
            raise BadConfig(text) from error
        reloaded = await self._store.reload(entries)
        if self._eager:
            self._spawn(self._store.load_all())
        return reloaded

    @contextmanager
    def on_signal(self) -> Iterator[None]:
        """SIGHUP reloads, inside the block."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, lambda: self._spawn(self._quietly()))
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGHUP)

    async def _quietly(self) -> None:
        with suppress(HeadwaterError):  # the log has it
            await self()

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
