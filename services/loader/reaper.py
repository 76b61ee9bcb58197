"""Removes what was left behind once its last user is gone; when that is the kernel does not tell, one has to look."""

from __future__ import annotations

from collections.abc import Iterable

from services.loader.admission import Admission
from services.loader.arenas import ArenaDir
from services.loader.models import Models
from services.loader.records import Part, Resident

PERIOD_S = 1.0


class Reaper:
    """Old generations, arenas of dead loaders, and config folders that were replaced while samplers may read them."""

    def __init__(self, admission: Admission, directory: ArenaDir, models: Models) -> None:
        self._admission = admission
        self._directory = directory
        self._models = models
        self._old_configs: dict[str, list[Resident]] = {}

    def leave_config(self, folder: str, parts: Iterable[Part]) -> None:
        """A folder is no model's any more; samplers that map these components may still read it."""
        if folder:
            self._old_configs[folder] = [resident for _, resident in parts]

    async def reap(self) -> bool:
        """Remove what has no user any more; whether a component went. Not while anybody else evicts."""
        self._admission.note_leases()
        self._directory.remove_stale()
        went = await self._admission.drop_unknown(self._models.identities)
        self._remove_configs()
        return went

    def _remove_configs(self) -> None:
        current = {record.config for record in self._models}
        for folder, residents in list(self._old_configs.items()):
            if not any(not resident.is_gone and resident.is_in_use for resident in residents):
                del self._old_configs[folder]
                if folder not in current:
                    self._directory.remove_config(folder)
