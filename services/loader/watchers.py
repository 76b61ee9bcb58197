"""Who watches, and what the loader asks of them: to let go of models whose room somebody else needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from services.loader.records import ModelView


@dataclass(frozen=True, slots=True)
class News:
    """What a watcher hears: models that are new or changed, names that are gone, names whose room is needed."""

    models: list[ModelView]
    removed: list[str]
    give_back: list[str]


@dataclass(eq=False, slots=True)
class Watcher:
    """One open watch."""

    replica: str
    known: dict[str, ModelView] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    is_new: bool = True

    def news(self, views: dict[str, ModelView]) -> News | None:
        """What has changed since it was last asked; None if nothing has."""
        news = News(
            [view for name, view in views.items() if self.known.get(name) != view],
            sorted(self.known.keys() - views.keys()),
            sorted(self.asked),
        )
        is_news = self.is_new or news.models or news.removed or news.give_back
        self.known, self.is_new = views, False
        self.asked.clear()
        return news if is_news else None


class Watchers:
    """All that watch now. Samplers do, as long as they live."""

    def __init__(self) -> None:
        self._here: list[Watcher] = []

    @contextmanager
    def joined(self, replica: str) -> Iterator[Watcher]:
        watcher = Watcher(replica)
        self._here.append(watcher)
        try:
            yield watcher
        finally:
            self._here.remove(watcher)

    @property
    def names(self) -> set[str]:
        return {watcher.replica for watcher in self._here}

    def ask_back(self, models: Iterable[str]) -> None:
        """Have everybody hear that the room of these models is needed."""
        for watcher in self._here:
            watcher.asked.update(models)
