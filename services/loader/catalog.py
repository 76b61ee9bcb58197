"""What a diffusers folder holds: components with params, and the small files around them.

Reads model_index.json, checkpoint headers and directory listings. Knows no architecture: a component is a subfolder
that model_index.json names and that holds safetensors or GGUF, or for which the operator names files.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from services.errors import BadCheckpoint
from services.loader.entries import ModelEntry
from services.loader.transcode import Transform, TypeRules, full_name, plan
from services.loader.weights import WEIGHTS_SUFFIXES, pick_files, read_named, role_of
from services.params.checkpoint import read_checkpoint
from services.params.header import VERSION
from services.params.layout import Layout, place
from services.params.specs import Checkpoint

MAX_SMALL_FILE_BYTES = 64 << 20
MAX_SMALL_FILES = 2_000
MAX_INDEX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ComponentSource:
    """A component on disk, and what of it changes on its way into an arena.

    identity: 32 hex digits that tell whether an arena holds exactly these bytes, so changed and so laid out.
    """

    name: str
    checkpoint: Checkpoint
    layout: Layout
    identity: str
    transform: Transform = field(default_factory=Transform)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on disk: components sorted by name, and its small files as (path inside the model, path).

    `small_digest` (16 hex digits) tells one state of the small files from another.
    """

    pipeline_class: str
    components: tuple[ComponentSource, ...]
    small_files: tuple[tuple[str, Path], ...]
    small_digest: str


def read_model(entry: ModelEntry, extent_bytes: int) -> ModelSource:
    """Read a model's folder. Raises BadCheckpoint, with names inside the model only."""
    try:
        index = read_index(entry.folder)
        parts = parts_of(index)
        picked = pick_files(entry.folder, parts, entry.variant, entry.files)
        small = tuple(_small_files(entry.folder, parts))
        small_digest = _digest_of(small)
    except OSError as error:
        raise BadCheckpoint(f"a file of the model cannot be read: {os.strerror(error.errno or 0)}") from error
    if not picked:
        raise BadCheckpoint("no component of the model has safetensors or GGUF files")
    _check_variant(entry.variant, picked.values())
    checkpoints = {
        name: read_named(name, paths) if name in entry.files else _read_own(name, paths[0])
        for name, paths in picked.items()
    }
    _check_rules(entry.types, checkpoints)
    components = tuple(
        _component(name, checkpoint, plan(name, checkpoint, entry.types, role_of(name)), extent_bytes)
        for name, checkpoint in checkpoints.items()
    )
    return ModelSource(str(index.get("_class_name", "")), components, small, small_digest)


def _check_variant(variant: str, picked: Iterable[Sequence[Path]]) -> None:
    if variant and not any(variant in path.name.split(".") for paths in picked for path in paths):
        raise BadCheckpoint(f'no component has files of the variant "{variant}"')


def _read_own(name: str, path: Path) -> Checkpoint:
    """The checkpoint in a component's own folder."""
    try:
        return read_checkpoint(path)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{name}/{error}") from error


def _check_rules(rules: TypeRules, checkpoints: Mapping[str, Checkpoint]) -> None:
    """A rule that is about nothing is a name that was mistyped: the model would be another than was meant."""
    names = (full_name(name, tensor) for name, checkpoint in checkpoints.items() for tensor in checkpoint.tensors)
    if rules and (pattern := rules.idle(names)) is not None:
        raise BadCheckpoint(
            f"types: no tensor's name has {pattern[:64]!r} in it; names are COMPONENT.TENSOR, and components are"
            f" {', '.join(checkpoints)}"
        )


def _component(name: str, checkpoint: Checkpoint, transform: Transform, extent_bytes: int) -> ComponentSource:
    identity = identity_of(checkpoint, extent_bytes, transform)
    return ComponentSource(
        name, checkpoint, place(transform.stored(checkpoint.tensors), extent_bytes), identity, transform
    )


def identity_of(checkpoint: Checkpoint, extent_bytes: int, transform: Transform | None = None) -> str:
    """Digest of all that decides an arena's bytes: the files' identities and headers, the layout, the transform."""
    files = [[*astuple(file.identity), file.header_digest] for file in checkpoint.files]
    types = dict(sorted(transform.types.items())) if transform else {}
    text = json.dumps({"layout": VERSION, "extent_bytes": extent_bytes, "transform": types or "none", "files": files})
    return xxhash.xxh3_128_hexdigest(text.encode())


def parts_of(index: Mapping[str, Any]) -> list[str]:
    """Names of what a model_index.json names, sorted, components with and without params. Raises BadCheckpoint."""
    return sorted(name for name, value in index.items() if _is_part(name, value))


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


def _is_part(name: str, value: object) -> bool:
    """Whether an entry is `"name": ["library", "Class"]`; null entries are parts that the model does without."""
    if name.startswith("_") or not isinstance(value, list) or len(value) != 2 or value[1] is None:
        return False
    if not name.isidentifier() or len(name) > 64:
        raise BadCheckpoint("model_index.json names a component that is no plain word")
    return True


def _small_files(folder: Path, parts: list[str]) -> Iterator[tuple[str, Path]]:
    """Top-level JSON files and all that is no weights file in the parts' folders."""
    paths = [path for path in folder.glob("*.json") if path.is_file()]
    for part in parts:
        paths += (path for path in (folder / part).rglob("*") if path.is_file())
    small = sorted(path for path in paths if _is_small(path))
    if len(small) > MAX_SMALL_FILES:
        raise BadCheckpoint(f"more than {MAX_SMALL_FILES} small files in the model's folder")
    for path in small:
        yield path.relative_to(folder).as_posix(), path


def _digest_of(small_files: Iterable[tuple[str, Path]]) -> str:
    text = repr([(inside, path.stat().st_size, path.stat().st_mtime_ns) for inside, path in small_files])
    return xxhash.xxh3_64_hexdigest(text.encode())


def _is_small(path: Path) -> bool:
    is_weights = path.suffix in WEIGHTS_SUFFIXES or ".safetensors.index." in path.name or ".bin.index." in path.name
    return not is_weights and not path.name.startswith(".") and path.stat().st_size <= MAX_SMALL_FILE_BYTES
