"""What a caller of prepare brings and holds: the order it wants extents in, and the components it waits for."""

import time
from collections.abc import Sequence
from enum import Enum, IntEnum

from services.errors import InvalidRequest
from services.loader.records import ModelRecord, Part

Order = Sequence[tuple[str, Sequence[int]]]  # components with extents; no extents: all of the component


class Urgency(IntEnum):
    """Of one extent in the queue. Smaller goes first; equals go in the order asked."""

    AWAITED = 0  # work stands still for it
    NAMED = 1
    PREPARED = 2
    ADOPTED = 3
    HINTED = 4
    EAGER = 5


class Priority(Enum):
    """Of a whole wish; the words of the protocol, and the loader's own EAGER."""

    EAGER = 0
    LOW = 1
    NORMAL = 2
    HIGH = 3

    @property
    def named(self) -> Urgency:
        """Of the extents that the wish names."""
        return (Urgency.EAGER, Urgency.HINTED, Urgency.NAMED, Urgency.AWAITED)[self.value]

    @property
    def rest(self) -> Urgency:
        return (Urgency.EAGER, Urgency.HINTED, Urgency.PREPARED, Urgency.PREPARED)[self.value]

    @property
    def may_evict(self) -> bool:
        """Whether what nobody uses may go for it."""
        return self is not Priority.EAGER


class Ticket:
    """A wish. While it is open what it wants is filled; one of a caller also keeps that from being evicted."""

    def __init__(self, priority: Priority = Priority.NORMAL, replica: str = "") -> None:
        self.parts: list[Part] = []
        self.priority = priority
        self.is_open = True
        self._replica = replica

    @property
    def may_ask(self) -> bool:
        """Whether samplers are to be asked to let go of what they do not use; not if nobody waits here."""
        return self.is_open and self.priority in (Priority.NORMAL, Priority.HIGH)

    def hold(self, parts: list[Part]) -> None:
        if not self.is_open or self.priority is Priority.EAGER:
            return
        self.parts = parts
        for _, resident in parts:
            resident.user_count += 1
            resident.last_used = time.monotonic()
            resident.askers.add(self._replica)

    def release(self) -> None:
        """The caller left: what nobody else wants is not filled any further."""
        self.is_open = False
        for _, resident in self.parts:
            resident.user_count -= 1
            resident.last_used = time.monotonic()  # a sampler may be about to map it


def check_order(record: ModelRecord, order: Order) -> None:
    counts = {part.name: len(part.layout.extents) for part in record.components}
    violations = []
    for index, (component, extents) in enumerate(order):
        if component not in counts:
            text = f"no component {component[:64]!r}; known: {', '.join(counts)}"
            violations.append((f"order[{index}].component", text))
        elif any(not 0 <= extent < counts[component] for extent in extents):
            violations.append((f"order[{index}].extents", f"extents of {component} are 0 to {counts[component] - 1}"))
    if violations:
        raise InvalidRequest(*violations)
