"""The models of models.toml: what their files hold, and what changes when the file or the files change."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import structlog

from services.errors import BadCheckpoint, UnknownModel
from services.loader.catalog import ModelSource, read_model
from services.loader.entries import ModelEntry
from services.loader.records import ModelRecord, Resident
from services.params.specs import FileIdentity

# Disks that hang must not keep a model from being served that is in memory.
_LOOK_S = 1.0

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What another models.toml changed: names, sorted."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]


class Models:
    """Records by name, sorted. Owns what is known of files; knows nothing of memory."""

    def __init__(self, entries: Iterable[ModelEntry], extent_bytes: int) -> None:
        self._extent_bytes = extent_bytes
        self._records = {entry.name: ModelRecord(entry) for entry in entries}
        self._told: set[str] = set()  # identities

    def __iter__(self) -> Iterator[ModelRecord]:
        return iter(list(self._records.values()))

    def __getitem__(self, name: str) -> ModelRecord:
        """Raises UnknownModel."""
        if name not in self._records:
            known = ", ".join(sorted(self._records)[:20])
            raise UnknownModel(f"no model {name[:64]!r}; known: {known}" if name else "no model named")
        return self._records[name]

    async def read_all(self) -> None:
        await asyncio.gather(*(self.read(record) for record in self))

    async def read(self, record: ModelRecord) -> None:
        """Read a model's headers again; `source`, or `reason` why there is none."""
        try:
            before, record.source = record.source, await asyncio.to_thread(read_model, record.entry, self._extent_bytes)
            record.reason = ""
            self._tell(record)
            if record.source.note and record.source != before:
                _log.info("a family was chosen", model=record.entry.name, note=record.source.note)
        except BadCheckpoint as error:
            record.source, record.reason = None, str(error)
            _log.warning("a model cannot be served", model=record.entry.name, reason=record.reason)

    def _tell(self, record: ModelRecord) -> None:
        """Say once of each component what is changed on its way into memory, and what could not be."""
        for part in record.components:
            change, label = part.transform, f"{record.entry.name}/{part.name}"
            if part.identity in self._told or not (change.types or change.left):
                continue
            self._told.add(part.identity)
            types = dict(Counter(change.types.values()))
            sizes = {"source_bytes": part.checkpoint.size_bytes, "arena_bytes": part.layout.data_bytes}
            _log.info("packed as it is read", component=label, tensors=types, **sizes)
            for reason, (count, size_bytes) in change.left.items():
                _log.info("tensors stay as they are", component=label, reason=reason, count=count,
                          size_bytes=size_bytes)  # fmt: skip

    async def replace(self, entries: Iterable[ModelEntry]) -> Reloaded:
        """Take over another models.toml; models whose entry and files are as before keep their record."""
        before, after = self._records, {entry.name: ModelRecord(entry) for entry in entries}
        await asyncio.gather(*(self.read(record) for record in after.values()))
        same = {name for name in before.keys() & after.keys() if _is_same(before[name], after[name])}
        self._records = {name: before[name] if name in same else record for name, record in after.items()}
        return Reloaded(
            added=tuple(sorted(after.keys() - before.keys())),
            removed=tuple(sorted(before.keys() - after.keys())),
            changed=tuple(sorted((before.keys() & after.keys()) - same)),
        )

    @property
    def identities(self) -> set[str]:
        """Of all components that some model has."""
        return {part.identity for record in self for part in record.components}

    def having(self, resident: Resident) -> list[ModelRecord]:
        """The models that a component belongs to."""
        identity = resident.source.identity
        return [record for record in self if any(part.identity == identity for part in record.components)]

    def is_pinned(self, resident: Resident) -> bool:
        return any(record.entry.pin for record in self.having(resident))

    def label(self, resident: Resident) -> str:
        """What people call a component, e.g. "sdxl/unet"."""
        for record in self.having(resident):
            for part in record.components:
                if part.identity == resident.source.identity:
                    return f"{record.entry.name}/{part.name}"
        return f"replaced/{resident.source.name}"


async def has_changed(record: ModelRecord) -> bool:
    """Whether files were replaced since they were read. Files that are not there now, or do not answer, have not."""
    if record.source is None:
        return False
    with suppress(TimeoutError):
        return await asyncio.wait_for(asyncio.to_thread(_differs, record.source), _LOOK_S)
    return False


def _differs(source: ModelSource) -> bool:
    with suppress(OSError):
        files = (file for part in source.components for file in part.checkpoint.files)
        return any(FileIdentity.of(file.path.stat()) != file.identity for file in files)
    return False


def _is_same(old: ModelRecord, new: ModelRecord) -> bool:
    return (old.entry, old.reason, old.source) == (new.entry, new.reason, new.source)
