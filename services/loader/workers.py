"""What a worker does with the next extent: fill it, or verify what a dead loader left. Runs on the event loop."""

import time
from collections import Counter

import structlog

from services.errors import HeadwaterError
from services.loader.fill import Filler
from services.loader.pace import FillStopped
from services.loader.progress import Changes
from services.loader.queue import FillQueue
from services.loader.records import Resident
from services.params.arena import ExtentState

_log = structlog.get_logger()


async def fill_forever(queue: FillQueue, filler: Filler, changes: Changes, read_bytes: Counter[str]) -> None:
    """Work on one extent after the other until the loader stops; counts what it reads by identity."""
    while True:
        resident, extent = await queue.take()
        try:
            if resident.states[extent] is not ExtentState.VERIFYING or not await _verify(resident, extent, filler):
                count = await _fill(resident, extent, filler)  # a line of its own: others add while this one waits
                read_bytes[resident.source.identity] += count
        except FillStopped:
            return
        except Exception as error:
            _fail(resident, extent, error)
        finally:
            queue.done(resident, extent)
            changes.notify()


async def _verify(resident: Resident, extent: int, filler: Filler) -> bool:
    arena = resident.arena
    if await filler.digest(arena, extent) == arena.digest(extent):
        arena.confirm(extent)
        resident.states[extent] = ExtentState.READY
        return True
    _log.warning("an adopted extent is damaged and filled again", component=resident.source.name, extent=extent)
    return False


async def _fill(resident: Resident, extent: int, filler: Filler) -> int:
    _set(resident, extent, ExtentState.FILLING)
    resident.filling_since = resident.filling_since or time.monotonic()
    count = await filler.fill(resident.arena, resident.source.checkpoint, resident.specs, extent)
    resident.states[extent] = ExtentState.READY
    if resident.is_ready:
        filler.forget(resident.source.checkpoint)
        seconds = round(time.monotonic() - resident.filling_since, 1)
        _log.info("ready", component=resident.source.name, size_bytes=resident.ready_bytes, seconds=seconds)
    return count


def _fail(resident: Resident, extent: int, error: Exception) -> None:
    """One extent that cannot be filled fails the component; all that is READY stays readable."""
    _set(resident, extent, ExtentState.FAILED)
    if resident.error is None:
        resident.error = error
        trace = None if isinstance(error, HeadwaterError) else error
        _log.error("a fill failed", component=resident.source.name, reason=str(error), exc_info=trace)


def _set(resident: Resident, extent: int, state: ExtentState) -> None:
    resident.arena.mark(extent, state)
    resident.states[extent] = state
