"""What checkpoint files are together: the family, which file is which component, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.errors import BadCheckpoint
from services.loader.assembly import Piece, assign, missing_from, pieces_of, tokenizers_of
from services.loader.family import Family, families_for
from services.params.recognise import Role


@dataclass
class SetReport:
    """Files as one model. `also`: other families that they fit; `components`: bytes by name; `missing`: what to name.

    `reason` says why they are no model together.
    """

    family: str
    also: list[str] = field(default_factory=list)
    components: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    reason: str = ""

    def lines(self) -> Iterator[str]:
        if self.reason:
            yield f"together these are no {self.family}: {self.reason}"
            return
        also = f" (or {', '.join(self.also)}: family = ... says which)" if self.also else ""
        missing = f"; missing: {'; '.join(self.missing)}" if self.missing else ""
        yield f"together these are {self.family}{also}{missing}"


def set_report(paths: Sequence[Path]) -> SetReport | None:
    """None if there is not one denoiser of a built-in family among the files."""
    pieces, bad = [], ""
    for path in paths:
        try:
            pieces += pieces_of([path])
        except BadCheckpoint as error:
            bad = bad or str(error)
    denoisers = [piece for piece in pieces if piece.shape.architecture.role is Role.DENOISER]
    families = families_for(denoisers[0].shape) if len(denoisers) == 1 else []
    if not families:
        return None
    report = SetReport(families[0].name, [family.name for family in families[1:]], reason=bad)
    try:
        _fill(report, families[0], pieces)
    except BadCheckpoint as error:
        report.reason = bad or str(error)
    return report


def _fill(report: SetReport, family: Family, pieces: Sequence[Piece]) -> None:
    checkpoints = assign(family, pieces)
    report.components = {part: checkpoints[part].size_bytes for part in sorted(checkpoints)}
    report.missing = missing_from(family, checkpoints) + tokenizers_of(family, checkpoints, {})[1]
