"""What a caller of prepare brings and holds: the order it wants extents in, and the components it waits for."""

import time
from collections.abc import Sequence

from services.errors import InvalidRequest
from services.loader.records import ModelRecord, Part

Order = Sequence[tuple[str, Sequence[int]]]  # components with extents; no extents: all of the component


class Ticket:
    """Keeps what a caller waits for from being evicted; a caller that left early holds nothing."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self._is_open = True

    def hold(self, parts: list[Part]) -> None:
        if self._is_open:
            self.parts = parts
            for _, resident in parts:
                resident.user_count += 1
                resident.last_used = time.monotonic()

    def release(self) -> None:
        self._is_open = False
        for _, resident in self.parts:
            resident.user_count -= 1


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
