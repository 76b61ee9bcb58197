"""A model's model_index.json: the pipeline's class, and the library and class of each of its parts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.errors import BadCheckpoint

MAX_INDEX_BYTES = 1 << 20


def read_index(folder: Path) -> dict[str, Any]:
    """A folder's model_index.json. Raises BadCheckpoint, OSError."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise BadCheckpoint("the model's folder has no model_index.json")
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise BadCheckpoint("model_index.json is larger than 1 MiB")
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint("model_index.json is no valid JSON") from error
    if not isinstance(index, dict):
        raise BadCheckpoint("model_index.json is no JSON object")
    return index


def parts_of(index: Mapping[str, Any]) -> list[str]:
    """Names of what a model_index.json names, sorted, components with and without params. Raises BadCheckpoint."""
    return sorted(name for name, value in index.items() if _is_part(name, value))


def _is_part(name: str, value: object) -> bool:
    """Whether an entry is `"name": ["library", "Class"]`; null entries are parts that the model does without."""
    if name.startswith("_") or not isinstance(value, list) or len(value) != 2 or value[1] is None:
        return False
    if not name.isidentifier() or len(name) > 64:
        raise BadCheckpoint("model_index.json names a component that is no plain word")
    return True
