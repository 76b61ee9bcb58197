"""The models that the operator names: in models.toml, and with --add. The only reader of either."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from services.loader.transcode import TypeRules, parse_type

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NAME_RULE = "a name is up to 64 letters, digits, dots, dashes and underscores"


class ConfigError(Exception):
    """A flag or a line of models.toml that cannot work; the message is for the operator and may name paths."""


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One table of models.toml. `variant` is diffusers' word: `fp16` picks `model.fp16.safetensors`.

    pin: once in memory its components stay there until an operator evicts them.
    files: by component, the weights files that are served in place of those in the folder.
    types: what its tensors become in memory.
    """

    name: str
    folder: Path
    variant: str = ""
    pin: bool = False
    files: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    types: TypeRules = field(default_factory=TypeRules)


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
    """The model of `--add NAME=PATH[,type=TYPE]`, a diffusers folder. Raises ConfigError."""
    name, equals, rest = text.partition("=")
    path, has_type, type_ = rest.partition(",type=")
    if not equals or not path:
        raise ConfigError(f"--add {text}: NAME=PATH was expected, such as sdxl=/models/sdxl")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--add {text}: {_NAME_RULE}")
    if not (Path(path) / "model_index.json").is_file():
        raise ConfigError(f"--add {text}: there is no model_index.json: give a diffusers folder, or use models.toml")
    types = _types(f"--add {text}", {"type": type_} if has_type else {})
    return ModelEntry(name, Path(path).absolute(), types=types)


def _entry(path: Path, name: str, table: object) -> ModelEntry:
    where = f"{path}: models.{name}"
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: {_NAME_RULE}")
    if not isinstance(table, dict) or not isinstance(table.get("folder"), str):
        raise ConfigError(f'{where} needs folder = "..."')
    _check_keys(where, table, {"folder", "variant", "pin", "files", "type", "types"})
    variant, pin = table.get("variant", ""), table.get("pin", False)
    if not isinstance(variant, str) or (variant and not _NAME.fullmatch(variant)):
        raise ConfigError(f'{where}: variant is a word such as "fp16"')
    if not isinstance(pin, bool):
        raise ConfigError(f"{where}: pin is true or false")
    files = _files(f"{where}.files", path.parent, table.get("files", {}))
    types = _types(where, table)
    return ModelEntry(name, (path.parent / table["folder"]).absolute(), variant, pin, files, types)


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


def _check_keys(where: str, table: dict[str, object], known: set[str]) -> None:
    if unknown := sorted(table.keys() - known):
        raise ConfigError(f"{where}: unknown key {', '.join(unknown)} (known: {', '.join(sorted(known))})")
