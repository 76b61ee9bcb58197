"""The models that the operator names: in models.toml, and with --add. The only reader of either."""

import re
import tomllib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from services.loader.transcode import TypeRules, parse_type

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TOKENIZER = re.compile(r"(?:tokenizer|processor)(?:_[0-9])?")
_KEYS = frozenset({"folder", "variant", "pin", "files", "checkpoint", "family", "tokenizer", "type", "types"})
_NAME_RULE = "a name is up to 64 letters, digits, dots, dashes and underscores"


class ConfigError(Exception):
    """A flag or a line of models.toml that cannot work; the message is for the operator and may name paths."""


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One table of models.toml. `variant` is diffusers' word: `fp16` picks `model.fp16.safetensors`.

    folder: a diffusers folder, whose configs and, where no other files are named, weights are taken; or none.
    pin: once in memory its components stay there until an operator evicts them.
    files: by component, the weights files that are served in place of those in the folder or the checkpoint.
    types: what its tensors become in memory.
    checkpoint: files whose components their tensors tell, such as one that holds all of them.
    family: a model without a folder has the configs of this one of those that are built in; empty: what its files tell.
    tokenizers: folders of the tokenizers of such a model, by the part's name.
    """

    name: str
    folder: Path | None = None
    variant: str = ""
    pin: bool = False
    files: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    types: TypeRules = field(default_factory=TypeRules)
    checkpoint: tuple[Path, ...] = ()
    family: str = ""
    tokenizers: Mapping[str, Path] = field(default_factory=dict)


def read_entries(file: Path | None, added: Sequence[ModelEntry]) -> tuple[ModelEntry, ...]:
    """The models of a models.toml, if there is one, and those of --add, sorted by name. Raises ConfigError."""
    entries: dict[str, ModelEntry] = {}
    for entry in (*(read_models(file) if file else ()), *added):
        if entry.name in entries:
            raise ConfigError(f"model {entry.name} is named twice: give one of them, or one --add, another name")
        entries[entry.name] = entry
    return tuple(entries[name] for name in sorted(entries))


def read_models(path: Path) -> tuple[ModelEntry, ...]:
    """The models of a models.toml, sorted by name; paths are relative to it. Raises ConfigError."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no valid TOML: {error}") from error
    _check_keys(f"{path}", document, {"models"})
    models = document.get("models")
    if not isinstance(models, dict) or not models:
        raise ConfigError(f"{path} has no [models.NAME] table")
    return tuple(_entry(path, name, table) for name, table in sorted(models.items()))


def parse_added(text: str) -> ModelEntry:
    """The model of `--add NAME=PATH[,PATH...]`: a diffusers folder or files, with what else models.toml would say.

    Raises ConfigError.
    """
    name, equals, rest = text.partition("=")
    if not equals or not rest:
        raise ConfigError(f"--add {text}: NAME=PATH was expected, such as sdxl=/models/sdxl or a=m.gguf,t.gguf,v.sft")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--add {text}: {_NAME_RULE}")
    chosen, items = _told_apart(rest.split(","))
    types = _types(f"--add {text}", chosen)
    if len(items) == 1 and Path(items[0]).is_dir():
        if not (Path(items[0]) / "model_index.json").is_file():
            raise ConfigError(f"--add {text}: there is no model_index.json: give a diffusers folder, or files")
        return ModelEntry(name, Path(items[0]).absolute(), types=types)
    return replace(_added_files(text, name, items), types=types)


def _told_apart(items: Sequence[str]) -> tuple[dict[str, object], list[str]]:
    """The `type=...` among the items of --add, and the others."""
    chosen = [item.removeprefix("type=") for item in items if item.startswith("type=")]
    return {"type": chosen[-1]} if chosen else {}, [item for item in items if not item.startswith("type=")]


def _added_files(text: str, name: str, items: Sequence[str]) -> ModelEntry:
    """Items are files whose components their tensors tell, or `component=file`, `tokenizer=folder`, `family=name`."""
    checkpoint: list[Path] = []
    table: dict[str, Any] = {}
    files: dict[str, list[str]] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            checkpoint.append(Path(item).absolute())
        elif key == "family" or _TOKENIZER.fullmatch(key):
            table[key] = value
        else:
            files.setdefault(key, []).append(value)
    if lost := [path.name for path in checkpoint if not path.is_file()]:
        raise ConfigError(f"--add {text}: there is no file {lost[0]}: give a diffusers folder, or files")
    if not checkpoint and not files:
        raise ConfigError(f"--add {text}: no file of weights is named")
    here = Path.cwd()
    named = _files(f"--add {text}", here, files)
    tokenizers, family = _tokenizers(f"--add {text}", here, table), _word(f"--add {text}", table, "family")
    return ModelEntry(name, None, files=named, checkpoint=tuple(checkpoint), family=family, tokenizers=tokenizers)


def _entry(path: Path, name: str, table: object) -> ModelEntry:
    where = f"{path}: models.{name}"
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: {_NAME_RULE}")
    if not isinstance(table, dict) or not table.keys() & {"folder", "checkpoint", "files"}:
        raise ConfigError(f'{where} needs folder = "...", checkpoint = "..." or [models.{name}.files]')
    keys = {key for key in table if _TOKENIZER.fullmatch(key)}
    _check_keys(where, table, _KEYS, keys)
    folder, pin = table.get("folder"), table.get("pin", False)
    if folder is not None and not isinstance(folder, str):
        raise ConfigError(f'{where} needs folder = "..."')
    if folder is not None and (odd := sorted(keys | (table.keys() & {"family"}))):
        raise ConfigError(f"{where}: {odd[0]} is for a model without a folder, whose own is used")
    if folder is None and "variant" in table:
        raise ConfigError(f"{where}: variant picks files of a folder, and there is none")
    if not isinstance(pin, bool):
        raise ConfigError(f"{where}: pin is true or false")
    files = _files(f"{where}.files", path.parent, table.get("files", {}))
    whole = _files(where, path.parent, {key: table[key] for key in table.keys() & {"checkpoint"}})
    return ModelEntry(
        name,
        (path.parent / folder).absolute() if folder is not None else None,
        _word(where, table, "variant"),
        pin,
        files,
        _types(where, table),
        whole.get("checkpoint", ()),
        _word(where, table, "family"),
        _tokenizers(where, path.parent, table),
    )


def _word(where: str, table: Mapping[str, object], key: str) -> str:
    value = table.get(key, "")
    if not isinstance(value, str) or (value and not _NAME.fullmatch(value)):
        example = "fp16" if key == "variant" else "z-image"
        raise ConfigError(f'{where}: {key} is a word such as "{example}"')
    return value


def _tokenizers(where: str, root: Path, table: Mapping[str, object]) -> dict[str, Path]:
    found = {}
    for key, value in table.items():
        if not _TOKENIZER.fullmatch(key):
            continue
        if not isinstance(value, str) or not value:
            raise ConfigError(f'{where}: {key} is a folder, "..."')
        found[key] = (root / value).absolute()
    return found


def _files(where: str, root: Path, table: object) -> dict[str, tuple[Path, ...]]:
    if not isinstance(table, dict):
        raise ConfigError(f'{where} is no table: write [models.NAME.files] and transformer = "..." under it')
    files = {}
    for component, value in table.items():
        paths = value if isinstance(value, list) else [value]
        if not paths or not all(isinstance(path, str) and path for path in paths):
            raise ConfigError(f'{where}: {component} is a file, "...", or a list of files, ["...", "..."]')
        files[component] = tuple((root / path).absolute() for path in paths)
    return files


def _types(where: str, table: Mapping[str, object]) -> TypeRules:
    """The keys `type` and `types` of a model's table, both optional."""
    rules = table.get("types", {})
    if not isinstance(rules, dict):
        raise ConfigError(f'{where}.types is no table: write [models.NAME.types] and "PATTERN" = "q8_0" under it')
    for pattern in rules:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{where}.types: {pattern!r} is no regular expression: {error}") from error
    try:
        type_ = parse_type(table["type"]) if "type" in table else ""
        found = TypeRules(type_, tuple((pattern, parse_type(value)) for pattern, value in rules.items()))
    except ValueError as error:
        raise ConfigError(f"{where}: type: {error}") from error
    if found and (missing := [name for name in ("numpy", "gguf") if not find_spec(name)]):
        raise ConfigError(f"{where}: a type needs {' and '.join(missing)}: pip install 'headwater[transcode]'")
    return found


def _check_keys(where: str, table: Mapping[str, object], known: Set[str], more: Set[str] = frozenset()) -> None:
    if unknown := sorted(table.keys() - known - more):
        raise ConfigError(f"{where}: unknown key {', '.join(unknown)} (known: {', '.join(sorted(known))})")
