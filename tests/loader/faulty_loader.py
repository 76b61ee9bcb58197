"""A loader with a mistake planted in it, for the campaign to find: the mistake's name, then a loader's flags."""

from __future__ import annotations

import sys

from services.loader.__main__ import main
from services.loader.extent_fill import ExtentFill
from services.loader.reads import Read
from services.params.arena import ExtentState
from services.params.owned_arena import OwnedArena


def adopt_by_size(self: OwnedArena) -> None:
    """The file is as long as it should be, so all of it must be there."""
    for extent in range(len(self.states())):
        self._set_state(extent, ExtentState.READY)


open_ = ExtentFill.open


def flag_first(self: ExtentFill) -> list[Read]:
    """READY, and then the data."""
    self._arena._set_state(self._extent, ExtentState.READY)
    return open_(self)


if __name__ == "__main__":
    match sys.argv.pop(1):
        case "size-only":
            OwnedArena.adopt = adopt_by_size  # type: ignore[method-assign]
        case "flag-first":
            ExtentFill.open = flag_first  # type: ignore[method-assign]
        case other:
            raise SystemExit(f"no mistake is called {other}")
    sys.exit(main())
