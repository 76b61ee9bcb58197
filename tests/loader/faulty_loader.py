"""A loader with a mistake planted in it, for the campaign to find: the mistake's name, then a loader's flags."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from services.loader.__main__ import main
from services.loader.fill import Filler
from services.params.arena import ExtentState
from services.params.owned_arena import OwnedArena
from services.params.specs import Checkpoint, TensorSpec


def adopt_by_size(self: OwnedArena) -> None:
    """The file is as long as it should be, so all of it must be there."""
    for extent in range(len(self.states())):
        self._set_state(extent, ExtentState.READY)


fill = Filler._fill


def flag_first(
    self: Filler, arena: OwnedArena, checkpoint: Checkpoint, specs: Mapping[str, TensorSpec], extent: int
) -> int:
    """READY, and then the data."""
    arena._set_state(extent, ExtentState.READY)
    return fill(self, arena, checkpoint, specs, extent)


if __name__ == "__main__":
    match sys.argv.pop(1):
        case "size-only":
            OwnedArena.adopt = adopt_by_size  # type: ignore[method-assign]
        case "flag-first":
            Filler._fill = flag_first  # type: ignore[method-assign]
        case other:
            raise SystemExit(f"no mistake is called {other}")
    sys.exit(main())
