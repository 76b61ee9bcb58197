"""What a diffusers folder holds: components with params, and the small files around them.

Reads model_index.json, checkpoint headers and directory listings. Knows no architecture: a component is a subfolder
that model_index.json names and that holds safetensors.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import xxhash

from services.errors import BadCheckpoint
from services.loader.config import ModelEntry
from services.params.checkpoint import read_checkpoint
from services.params.header import VERSION
from services.params.layout import Layout, place
from services.params.specs import Checkpoint

MAX_SMALL_FILE_BYTES = 64 << 20
MAX_SMALL_FILES = 2_000
MAX_INDEX_BYTES = 1 << 20

WEIGHTS_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".msgpack", ".h5", ".onnx", ".onnx_data"}
)
# Files that tell a tokenizer, processor or scheduler, which have no params, from a model.
_NO_MODEL = frozenset(
    {"tokenizer_config.json", "preprocessor_config.json", "processor_config.json", "scheduler_config.json"}
)
_STEMS = ("diffusion_pytorch_model", "model")


@dataclass(frozen=True, slots=True)
class ComponentSource:
    """A component on disk. `identity` (32 hex digits) tells whether an arena holds exactly these bytes, so laid out."""

    name: str
    checkpoint: Checkpoint
    layout: Layout
    identity: str


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
        index = _read_index(entry.folder)
        parts = sorted(name for name, value in index.items() if _is_part(name, value))
        picked = {name: path for name in parts if (path := pick_weights(entry.folder / name, entry.variant))}
        small = tuple(_small_files(entry.folder, parts))
        small_digest = _digest_of(small)
    except OSError as error:
        raise BadCheckpoint(f"a file of the model cannot be read: {os.strerror(error.errno or 0)}") from error
    if not picked:
        raise BadCheckpoint("no component of the model has safetensors files")
    if entry.variant and not any(_has_variant(path, entry.variant) for path in picked.values()):
        raise BadCheckpoint(f'no component has files of the variant "{entry.variant}"')
    components = tuple(_component(name, path, extent_bytes) for name, path in picked.items())
    return ModelSource(str(index.get("_class_name", "")), components, small, small_digest)


def pick_weights(folder: Path, variant: str) -> Path | None:
    """The index or file that holds a component's params; None if the component has none.

    In this order: with the variant, then without; shards before a single file; diffusers' name before transformers';
    else the only safetensors file there is.
    """
    if not folder.is_dir():
        raise BadCheckpoint(f"{folder.name}: named by model_index.json, but the folder is missing")
    names = {path.name for path in folder.iterdir() if path.is_file()}
    for word in dict.fromkeys((variant, "")):
        for stem in _STEMS:
            for name in _candidates(stem, word):
                if name in names:
                    return folder / name
    found = sorted(name for name in names if name.endswith(".safetensors"))
    packed = sorted(name for name in names if name.endswith(".gguf"))
    if not found and len(packed) == 1:
        return folder / packed[0]
    if len(found) > 1:
        raise BadCheckpoint(f"{folder.name}: several safetensors files and none with a usual name: {found[0]}, ...")
    if not found and any(Path(name).suffix in WEIGHTS_SUFFIXES for name in names):
        raise BadCheckpoint(f"{folder.name}: weights, but no safetensors: convert them (pickles are never opened)")
    if not found and "config.json" in names and not names & _NO_MODEL:
        raise BadCheckpoint(f"{folder.name}: a model's config.json, but no safetensors file")
    return folder / found[0] if found else None


def _candidates(stem: str, variant: str) -> tuple[str, ...]:
    if not variant:
        return f"{stem}.safetensors.index.json", f"{stem}.safetensors"
    return (
        f"{stem}.safetensors.index.{variant}.json",
        f"{stem}.{variant}.safetensors.index.json",
        f"{stem}.{variant}.safetensors",
    )


def _has_variant(path: Path, variant: str) -> bool:
    return variant in path.name.split(".")


def _component(name: str, path: Path, extent_bytes: int) -> ComponentSource:
    try:
        checkpoint = read_checkpoint(path)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{name}/{error}") from error
    identity = identity_of(checkpoint, extent_bytes)
    return ComponentSource(name, checkpoint, place(checkpoint.tensors, extent_bytes), identity)


def identity_of(checkpoint: Checkpoint, extent_bytes: int) -> str:
    """Digest of all that decides an arena's bytes: the files' identities and headers, the layout, the transform."""
    files = [[*astuple(file.identity), file.header_digest] for file in checkpoint.files]
    text = json.dumps({"layout": VERSION, "extent_bytes": extent_bytes, "transform": "none", "files": files})
    return xxhash.xxh3_128_hexdigest(text.encode())


def _read_index(folder: Path) -> dict[str, Any]:
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
