"""How much memory pictures need beside params, learnt from those that were drawn. Pure: knows sizes, no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from services.sampler.requests import ImageRequest, Task

# Before anything was drawn: what a picture keeps while others run, as a share of what it needs at most.
PARKED_SHARE = 8
# Measured needs vary a little with what lay where in memory.
MARGIN = 1.05
# What libraries take for themselves whatever the size: 32 MiB each for cuBLAS and cuBLASLt on an H100 or H200.
SCRATCH_BYTES = 64 << 20


# Pipelines that edit bring a reference image to about this area, or leave it if it is smaller.
REFERENCE_PX = 1 << 20


@dataclass(frozen=True, slots=True)
class Kind:
    """What decides how much memory a picture needs."""

    model: str
    width_px: int
    height_px: int
    tiled: bool = False  # decoded in tiles
    task: Task = Task.TEXT_TO_IMAGE
    reference_px: tuple[tuple[int, int], ...] = ()  # sizes of images that keep theirs, not the picture's

    @property
    def area_px(self) -> int:
        """Of all that is computed at once: the picture, and what it refers to."""
        references = sum(min(width * height, REFERENCE_PX) for width, height in self.reference_px)
        return self.width_px * self.height_px + references

    def is_like(self, other: Kind) -> bool:
        """Whether one says something of the other: all but sizes is the same."""
        return (self.model, self.tiled, self.task) == (other.model, other.tiled, other.task)


def kind_of(model: str, request: ImageRequest, size_px: tuple[int, int]) -> Kind:
    """The kind of a resolved request's pictures; size_px: (width, height) as far as is known."""
    sizes = tuple(image.size for image in request.reference_images) if request.task is Task.EDIT else ()
    return Kind(model, *size_px, bool(request.tiled_decode), request.task, sizes)


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes: the most that a picture takes while it runs, and the most that it keeps while others run."""

    peak_bytes: int
    parked_bytes: int

    def scaled(self, factor: float, fixed_bytes: int = 0) -> Need:
        """`factor` times as much, of which the first `fixed_bytes` stay as they are."""

        def grown(size: int) -> int:
            fixed = min(size, fixed_bytes)
            return fixed + round((size - fixed) * factor)

        return Need(grown(self.peak_bytes), grown(self.parked_bytes))

    def __or__(self, other: Need) -> Need:
        return Need(max(self.peak_bytes, other.peak_bytes), max(self.parked_bytes, other.parked_bytes))


class WorkMemory:
    """What pictures of each kind were seen to need."""

    def __init__(self, guess_bytes: int, scratch_bytes: int = SCRATCH_BYTES) -> None:
        self._scratch_bytes = scratch_bytes
        self._guess = Need(guess_bytes, guess_bytes // PARKED_SHARE)
        self._seen: dict[Kind, Need] = {}

    def is_known(self, kind: Kind) -> bool:
        return kind in self._seen

    def learn(self, kind: Kind, need: Need) -> None:
        """Remember the most that was seen."""
        self._seen[kind] = self._seen.get(kind, need) | need

    def need(self, kind: Kind) -> Need:
        """As seen; else scaled by area, without libraries' scratch memory, from the model's picture nearest in size, of
        the same task and tiled or not alike; else the guess.
        """
        if kind in self._seen:
            return self._seen[kind].scaled(MARGIN)
        alike = [k for k in self._seen if k.is_like(kind)]
        if not alike:
            return self._guess
        nearest = min(alike, key=lambda k: abs(k.area_px - kind.area_px))
        return self._seen[nearest].scaled(max(1.0, kind.area_px / nearest.area_px), self._scratch_bytes).scaled(MARGIN)

    def least_bytes(self, kinds: Iterable[Kind]) -> int:
        """What one picture of any of these kinds needs, and no less than the guess, which is all that a start knows."""
        return max([self._guess.peak_bytes, *(self.need(kind).peak_bytes for kind in kinds)])

    def never_fits(self, kind: Kind, room_bytes: int) -> bool:
        """Whether `kind` needs more than the room, so surely that it need not be tried.

        What tiles need hardly grows with the picture, so a scaled need says little of them.
        """
        return self.need(kind).peak_bytes > room_bytes and (self.is_known(kind) or not kind.tiled)

    def room_bytes(self, kinds: Iterable[Kind]) -> int:
        """What pictures of these kinds need together: one of them runs at a time."""
        needs = [self.need(kind) for kind in kinds]
        running = max((n.peak_bytes - n.parked_bytes for n in needs), default=0)
        return running + sum(n.parked_bytes for n in needs)

    def largest(self, kind: Kind, room_bytes: int, multiple_px: int) -> tuple[int, int]:
        """(width, height) of the largest picture of the same shape, at most `kind`, that needs no more than the room.

        (0, 0) if there is none.
        """
        needed = self.need(kind).peak_bytes
        fixed = min(needed, round(self._scratch_bytes * MARGIN))
        share = min(1.0, max(room_bytes - fixed, 0) / max(needed - fixed, 1))
        width, height = (
            int(edge * share**0.5) // multiple_px * multiple_px for edge in (kind.width_px, kind.height_px)
        )
        return (width, height) if width and height else (0, 0)
