"""Whose a folder is, and what its owner may do there; for an operator whose loader runs as another user."""

from __future__ import annotations

import os
from pathlib import Path

from services.loader.entries import ConfigError


def check_own(folder: Path) -> None:
    """Raises ConfigError if another user owns the folder, who could put something else in an arena's place, or if its
    owner may not write to it.
    """
    owner, me = folder.stat().st_uid, os.geteuid()
    if owner != me:
        raise ConfigError(
            f"{folder} has {_rights(folder)}, and the loader runs as uid {me}: chown it, run the loader as uid {owner},"
            " or give --arena-dir a folder that is not there yet"
        )
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        raise ConfigError(f"{folder} has {_rights(folder)}, and the loader has to write there: chmod u+rwx {folder}")


def missing_rights(error: OSError) -> str:
    """More about an error that is a lack of rights: where they are missing, and what to do. Else nothing."""
    if not isinstance(error, PermissionError) or not error.filename:
        return ""
    path = Path(error.filename)
    there = next(folder for folder in (path, *path.parents) if os.access(folder, os.F_OK, effective_ids=True))
    return f"; {there} has {_rights(there)}, and the loader runs as uid {os.geteuid()}: chown or chmod it"


def _rights(path: Path) -> str:
    status = path.stat()
    return f"owner uid {status.st_uid} and mode {status.st_mode & 0o7777:04o}"
