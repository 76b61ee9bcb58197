"""What the store remembers: models, the components of theirs that are in memory, and what callers see of both."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from services.errors import HeadwaterError
from services.loader.catalog import ComponentSource, ModelSource
from services.loader.entries import ModelEntry
from services.params.arena import ExtentState
from services.params.owned_arena import OwnedArena
from services.params.specs import TensorSpec


class Residency(Enum):
    """State of a component or a model; the words of the protocol."""

    ABSENT = 1
    FILLING = 2
    READY = 3
    FAILED = 4


@dataclass(frozen=True, slots=True)
class ComponentView:
    name: str
    arena: str
    generation: str
    size_bytes: int
    ready_bytes: int
    extent_count: int
    state: Residency
    identity: str


@dataclass(frozen=True, slots=True)
class ModelView:
    name: str
    pipeline_class: str
    state: Residency
    reason: str
    components: tuple[ComponentView, ...]
    config: str
    read_bytes: int


@dataclass(frozen=True, slots=True)
class Progress:
    """One news item of a fill; `ready` are extents that became READY since the last one, by component."""

    model: ModelView | None
    total_bytes: int
    ready_bytes: int
    rate_bytes_per_second: int
    eta_s: float | None
    ready: dict[str, list[int]]
    is_done: bool


@dataclass(eq=False, slots=True)
class ModelRecord:
    """A model of models.toml. `is_wanted` from the first prepare until it is evicted."""

    entry: ModelEntry
    source: ModelSource | None = None
    reason: str = ""
    config: str = ""
    is_wanted: bool = False

    @property
    def components(self) -> tuple[ComponentSource, ...]:
        return self.source.components if self.source else ()


@dataclass(eq=False, slots=True)
class Resident:
    """A component in memory, for every model that has it.

    `states` mirrors the arena's bytes. `busy` are extents that a thread works on now; `user_count` are open prepare
    calls. Neither may be evicted. `askers` are the replicas that have prepared it.
    """

    arena: OwnedArena
    source: ComponentSource
    specs: dict[str, TensorSpec]
    states: list[ExtentState]
    error: Exception | None = None
    is_gone: bool = False
    busy: set[int] = field(default_factory=set)
    user_count: int = 0
    askers: set[str] = field(default_factory=set)
    filling_since: float | None = None
    last_used: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, arena: OwnedArena, source: ComponentSource) -> "Resident":
        specs = {tensor.name: tensor for tensor in source.checkpoint.tensors}
        return cls(arena, source, specs, arena.states())

    @property
    def ready_bytes(self) -> int:
        extents = self.arena.header.layout.extents
        return sum(extent.size_bytes for extent, state in zip(extents, self.states, strict=True) if state == 3)

    @property
    def is_ready(self) -> bool:
        return all(state is ExtentState.READY for state in self.states)

    @property
    def is_in_use(self) -> bool:
        return bool(self.user_count or self.busy) or self.arena.is_leased()

    @property
    def residency(self) -> Residency:
        if self.error:
            return Residency.FAILED
        return Residency.READY if self.is_ready else Residency.FILLING

    def view(self, name: str) -> ComponentView:
        layout, is_failed = self.arena.header.layout, self.error is not None
        return ComponentView(
            name,
            "" if is_failed else self.arena.path.name,
            "" if is_failed else self.arena.header.generation,
            layout.data_bytes,
            self.ready_bytes,
            len(layout.extents),
            self.residency,
            self.source.identity,
        )


Part = tuple[str, Resident]  # a component of a model, by the model's name for it


def absent_view(source: ComponentSource) -> ComponentView:
    count = len(source.layout.extents)
    return ComponentView(source.name, "", "", source.layout.data_bytes, 0, count, Residency.ABSENT, source.identity)


def model_state(states: list[Residency]) -> Residency:
    """FAILED if any component is; READY when all are; else FILLING or ABSENT."""
    if not states or Residency.FAILED in states:
        return Residency.FAILED
    if set(states) == {Residency.READY}:
        return Residency.READY
    return Residency.ABSENT if set(states) == {Residency.ABSENT} else Residency.FILLING


def view_of(record: ModelRecord, here: Mapping[str, Resident], read_bytes: Mapping[str, int]) -> ModelView:
    """A model as callers see it; `here` are its components in memory, `read_bytes` counts by identity."""
    views = [here[part.name].view(part.name) if part.name in here else absent_view(part) for part in record.components]
    errors = [sentence(resident.error) for resident in here.values() if resident.error]
    return ModelView(
        record.entry.name,
        record.source.pipeline_class if record.source else "",
        model_state([view.state for view in views]),
        record.reason or (errors[0] if errors else ""),
        tuple(views),
        record.config,
        sum(read_bytes.get(identity, 0) for identity in {part.identity for part in record.components}),
    )


def sentence(error: Exception) -> str:
    """What a stranger may read of an error."""
    return str(error) if isinstance(error, HeadwaterError) else "internal error; the loader's log says more"
