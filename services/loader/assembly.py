"""A model put together of files: which of them is which component, and what its configs and tokenizers are.

The configs are those of a folder, or of the built-in family that the denoiser is told to be. A file is checked against
them by what its tensors' names and shapes tell, so that a set of files that do not belong together is refused here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.errors import BadCheckpoint
from services.loader.family import Family, Shape, families_for, shape_of
from services.loader.gguf_tokenizer import check_tokenizer
from services.params.all_in_one import split
from services.params.checkpoint import joined, read_checkpoint
from services.params.recognise import Role
from services.params.specs import Checkpoint

# A denoiser first, for if it does not fit nothing will; what adds to a text encoder behind it.
_ORDER = {Role.DENOISER: 0, Role.VISION_TOWER: 2}
_KINDS = frozenset({"Qwen2", "CLIP", "T5"})
_TOKENIZER_FILES = {
    "T5": ("tokenizer.json", "spiece.model"),
    "": ("tokenizer.json", "vocab.json"),
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A component in a file, not yet told which."""

    file: str
    checkpoint: Checkpoint
    shape: Shape


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Where a tokenizer's files come from: a folder, or the metadata of a GGUF file."""

    part: str
    path: Path


def pieces_of(paths: Sequence[Path]) -> list[Piece]:
    """The components in files; one that holds several is taken apart. Raises BadCheckpoint."""
    return [piece for path in paths for piece in _pieces(path)]


def _pieces(path: Path) -> Iterator[Piece]:
    whole = read_checkpoint(path)
    shape = shape_of(whole)
    if shape.architecture.role is Role.LORA:
        raise BadCheckpoint(f"{path.name}: LoRA found, which is no component of a model: name another file")
    if shape.architecture.role is Role.ALL_IN_ONE:
        for checkpoint in split(whole).values():
            yield Piece(path.name, checkpoint, shape_of(checkpoint))
    elif shape.architecture.role is Role.UNKNOWN:
        raise BadCheckpoint(f"{path.name}: no model that is known here: name its component, as in vae = ...")
    else:
        yield Piece(path.name, whole, shape)


def families_of(pieces: Sequence[Piece], named: Mapping[str, Checkpoint]) -> list[Family]:
    """The built-in families that a model's denoiser fits, at least one, the usual one first. Raises BadCheckpoint."""
    shapes = [shape_of(named[part]) for part in ("transformer", "unet") if part in named]
    shapes += [piece.shape for piece in pieces if piece.shape.architecture.role is Role.DENOISER]
    if not shapes:
        raise BadCheckpoint("none of the files is a denoiser, so it is not told which family of models this is")
    fitting = families_for(shapes[0])
    if not fitting:
        raise BadCheckpoint(f"no built-in family has {shapes[0]}: name a diffusers folder, which brings the configs")
    return fitting


def assign(family: Family, pieces: Sequence[Piece]) -> dict[str, Checkpoint]:
    """The checkpoint of each component that pieces are told to be. Raises BadCheckpoint for a piece that is none."""
    found: dict[str, list[Checkpoint]] = {}
    for piece in sorted(pieces, key=lambda piece: _ORDER.get(piece.shape.architecture.role, 1)):
        part = _part_for(family, piece, found)
        if part is None:
            wanted = "; ".join(f"{name}: {shape}" for name, shape in family.wanted.items())
            raise BadCheckpoint(f"{piece.file}: {piece.shape} found, where {family.name} has {wanted}")
        found.setdefault(part, []).append(piece.checkpoint)
    return {part: joined(checkpoints) for part, checkpoints in found.items()}


def _part_for(family: Family, piece: Piece, found: Mapping[str, list[Checkpoint]]) -> str | None:
    if piece.shape.architecture.role is Role.VISION_TOWER:
        return "text_encoder" if "text_encoder" in found else None
    fitting = [part for part, wanted in family.wanted.items() if piece.shape.fits(wanted)]
    return next((part for part in fitting if part not in found), None)


def check_fits(family: Family, part: str, checkpoint: Checkpoint) -> None:
    """Raises BadCheckpoint if a component's files can be told to be of another model."""
    wanted, found = family.wanted.get(part), shape_of(checkpoint)
    if wanted and found.contradicts(wanted):
        name = checkpoint.files[0].path.name
        raise BadCheckpoint(f"{part}: {name}: {wanted} expected by {family.name}, {found} found")


def missing_from(family: Family, checkpoints: Mapping[str, Checkpoint]) -> list[str]:
    """The components that no file is for, each with what it would be."""
    return [f"{part} ({shape})" for part, shape in family.wanted.items() if part not in checkpoints]


def tokenizers_of(
    family: Family, checkpoints: Mapping[str, Checkpoint], folders: Mapping[str, Path]
) -> tuple[list[Tokenizer], list[str]]:
    """Where each tokenizer and processor of a family is, and what is to be said of those that are nowhere.

    folders: those that the operator names, by part. Raises BadCheckpoint for one that is none of this family's.
    """
    parts = [part for part in family.parts if part.startswith(("tokenizer", "processor"))]
    if odd := sorted(folders.keys() - set(parts)):
        raise BadCheckpoint(f"{family.name} has no {odd[0]}; it has {', '.join(parts)}")
    found, missing = [], []
    for part in parts:
        # A processor is the tokenizer and how pictures are prepared, which the family knows.
        path = folders.get(part) or (folders.get("tokenizer") if part == "processor" else None)
        kind = _kind(family.class_of(part))
        why = _why_not(path, kind) if path else ""
        if path is None and kind == "Qwen2":
            path, why = _in_gguf(checkpoints.get("text_encoder"))
        if path and not why:
            found.append(Tokenizer(part, path))
        else:
            missing.append(f'{part} = "...", the folder of a {kind} tokenizer{why}')
    return found, missing


def _kind(class_name: str) -> str:
    for ending in ("Fast", "Tokenizer", "VLProcessor"):
        class_name = class_name.removesuffix(ending)
    return class_name


def _in_gguf(checkpoint: Checkpoint | None) -> tuple[Path | None, str]:
    """The file of a text encoder that brings a tokenizer, or why there is none."""
    path = checkpoint.files[0].path if checkpoint else None
    if path is None or path.suffix != ".gguf":
        return None, ""
    try:
        check_tokenizer(path)
    except BadCheckpoint as error:
        return None, f" ({error})"
    return path, ""


def _why_not(folder: Path, kind: str) -> str:
    """Why a folder has no tokenizer of this kind; empty if it has one."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    wanted = _TOKENIZER_FILES.get(kind, _TOKENIZER_FILES[""])
    if not names.intersection(wanted):
        return f" ({folder.name} has no {' and no '.join(wanted)})"
    other = _kind(_class_in(folder / "tokenizer_config.json"))
    return f" ({folder.name} is of a {other} tokenizer)" if other and other != kind and other in _KINDS else ""


def _class_in(config: Path) -> str:
    try:
        return str(json.loads(config.read_bytes()).get("tokenizer_class", ""))
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
