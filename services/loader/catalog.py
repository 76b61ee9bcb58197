"""What a model's files hold: components with params, and the small files around them.

Reads model_index.json, checkpoint headers and directory listings. A component is a subfolder that model_index.json
names and that holds safetensors or GGUF, or for which the operator names files; which file is for what, and what there
is without a folder, is in assembly.py.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path

import xxhash

from services.errors import BadCheckpoint
from services.loader.assembly import (
    Tokenizer,
    assign,
    check_fits,
    families_of,
    missing_from,
    pieces_of,
    tokenizers_of,
)
from services.loader.entries import ModelEntry
from services.loader.family import Family, built_in, family_in
from services.loader.transcode import Transform, TypeRules, full_name, plan
from services.loader.weights import WEIGHTS_SUFFIXES, pick_files, read_named, role_of
from services.params.checkpoint import read_checkpoint
from services.params.header import VERSION
from services.params.layout import Layout, place
from services.params.specs import Checkpoint

MAX_SMALL_FILE_BYTES = 64 << 20
MAX_SMALL_FILES = 2_000


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

    `small_digest` (16 hex digits) tells one state of the small files from another. `tokenizers` are small files that
    are made of a GGUF file's metadata, as (folder inside the model, path). `note` is what the log should say of it.
    """

    pipeline_class: str
    components: tuple[ComponentSource, ...]
    small_files: tuple[tuple[str, Path], ...]
    small_digest: str
    tokenizers: tuple[tuple[str, Path], ...] = ()
    note: str = ""


def read_model(entry: ModelEntry, extent_bytes: int) -> ModelSource:
    """Read the headers of a model's files. Raises BadCheckpoint, with names inside the model only."""
    try:
        return (_read_folder if entry.folder else _read_files)(entry, extent_bytes)
    except OSError as error:
        raise BadCheckpoint(f"a file of the model cannot be read: {os.strerror(error.errno or 0)}") from error


def _read_folder(entry: ModelEntry, extent_bytes: int) -> ModelSource:
    """A model with a diffusers folder: what is in no named file is in the folder."""
    folder = entry.folder or Path()
    family = family_in(folder, "the folder")
    checkpoints = assign(family, pieces_of(entry.checkpoint))
    elsewhere = dict.fromkeys(checkpoints, ()) | dict(entry.files)
    picked = pick_files(folder, family.parts, entry.variant, elsewhere)
    _check_variant(entry.variant, picked.values())
    checkpoints |= _named(entry)
    for part, checkpoint in checkpoints.items():
        check_fits(family, part, checkpoint)
    checkpoints |= {part: _read_own(part, paths[0]) for part, paths in picked.items() if part not in checkpoints}
    if not checkpoints:
        raise BadCheckpoint("no component of the model has safetensors or GGUF files")
    return _source(entry.types, family, checkpoints, dict(_small_files(folder, family.parts)), extent_bytes)


def _read_files(entry: ModelEntry, extent_bytes: int) -> ModelSource:
    """A model without a folder: the configs are those of a built-in family."""
    named, pieces = _named(entry), pieces_of(entry.checkpoint)
    families = [built_in(entry.family)] if entry.family else families_of(pieces, named)
    family, others = families[0], [other.name for other in families[1:]]
    if odd := sorted(named.keys() - family.wanted.keys()):
        raise BadCheckpoint(f"{family.name} has no {odd[0][:64]}; it has {', '.join(family.wanted)}")
    checkpoints = assign(family, pieces) | named
    for part, checkpoint in checkpoints.items():
        check_fits(family, part, checkpoint)
    if missing := missing_from(family, checkpoints):
        raise BadCheckpoint(f"{family.name}: no file for {', '.join(missing)}")
    tokenizers, absent = tokenizers_of(family, checkpoints, entry.tokenizers)
    if absent:
        raise BadCheckpoint(f"{family.name} needs {'; '.join(absent)}")
    small, made = dict(_small_files(family.folder, family.parts)), []
    for tokenizer in tokenizers:
        if tokenizer.path.is_dir():
            small |= _tokenizer_files(tokenizer)
        else:
            made.append((tokenizer.part, tokenizer.path))
    note = f"taken for {family.name}; its files fit {', '.join(others)} too: family = ... says which" if others else ""
    return _source(entry.types, family, checkpoints, small, extent_bytes, tuple(made), note)


def _tokenizer_files(tokenizer: Tokenizer) -> dict[str, Path]:
    """The files of a tokenizer's folder, by their paths inside the model."""
    paths = [path for path in tokenizer.path.iterdir() if path.is_file() and _is_small(path)]
    if len(paths) > MAX_SMALL_FILES:
        raise BadCheckpoint(f"{tokenizer.part}: more than {MAX_SMALL_FILES} small files in its folder")
    return {f"{tokenizer.part}/{path.name}": path for path in paths}


def _named(entry: ModelEntry) -> dict[str, Checkpoint]:
    return {part: read_named(part, paths) for part, paths in entry.files.items()}


def _source(
    types: TypeRules,
    family: Family,
    checkpoints: Mapping[str, Checkpoint],
    small: Mapping[str, Path],
    extent_bytes: int,
    made: tuple[tuple[str, Path], ...] = (),
    note: str = "",
) -> ModelSource:
    _check_rules(types, checkpoints)
    components = tuple(
        _component(name, checkpoint, plan(name, checkpoint, types, role_of(name)), extent_bytes)
        for name, checkpoint in sorted(checkpoints.items())
    )
    pipeline_class = str(family.index.get("_class_name", ""))
    files = tuple(sorted(small.items()))
    return ModelSource(pipeline_class, components, files, _digest_of((*files, *made)), made, note)


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
    whole = {"layout": VERSION, "extent_bytes": extent_bytes, "transform": types or "none", "files": files}
    text = json.dumps(whole | ({"part": checkpoint.part} if checkpoint.part else {}))
    return xxhash.xxh3_128_hexdigest(text.encode())


def _small_files(folder: Path, parts: Sequence[str]) -> Iterator[tuple[str, Path]]:
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
