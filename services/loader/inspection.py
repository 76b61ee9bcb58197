"""What checkpoint files and model folders hold, told from their headers: `headwater-loader --inspect`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

from services.errors import BadCheckpoint
from services.loader.catalog import read_model
from services.loader.config import Inspect
from services.loader.entries import ModelEntry, read_models
from services.loader.family import Shape, families_for, shape_of
from services.loader.index import parts_of, read_index
from services.loader.together import SetReport, set_report
from services.loader.weights import pick_weights
from services.params.all_in_one import split
from services.params.checkpoint import read_checkpoint
from services.params.dimensions import Dimensions
from services.params.layout import EXTENT_BYTES
from services.params.recognise import UNKNOWN, Architecture, Role
from services.params.specs import Checkpoint, TensorSpec

_FORMATS = {".gguf": "GGUF", ".json": "sharded safetensors"}
_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


@dataclass
class Amount:
    """Tensors of one type."""

    count: int = 0
    size_bytes: int = 0


@dataclass
class PartReport:
    """One component of a file that holds several."""

    architecture: Architecture
    dimensions: Dimensions
    tensor_count: int
    size_bytes: int


@dataclass
class FileReport:
    """One file, or the shards of an index; `files` are base names, `stated` is the file's own word for what it is.

    `families` are the built-in ones that a denoiser is of; `parts` the components of a file that holds several, by the
    prefix of their tensors.
    `reason` says why it cannot be read; the rest is empty then.
    """

    path: str
    format: str
    files: list[str] = field(default_factory=list)
    architecture: Architecture = UNKNOWN
    dimensions: Dimensions = field(default_factory=Dimensions)
    families: list[str] = field(default_factory=list)
    parts: dict[str, PartReport] = field(default_factory=dict)
    stated: str = ""
    tensor_count: int = 0
    size_bytes: int = 0
    types: dict[str, Amount] = field(default_factory=dict)
    reason: str = ""


@dataclass
class FolderReport:
    """A model's folder. `missing`: why a component that model_index.json names has no weights, by its name."""

    path: str
    pipeline_class: str = ""
    components: dict[str, FileReport] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    reason: str = ""


Report = FileReport | FolderReport


def run(inspect: Inspect) -> int:
    """Print what each file or folder is; 1 if something cannot be read."""
    reports: list[Report | SetReport] = []
    paths = list(_expanded(inspect.paths))
    for report in chain.from_iterable(map(_reports, paths)):
        reports.append(report)
        if not inspect.as_json:
            print("\n".join(_lines(report)), flush=True)  # noqa: T201
    if together := set_report([path for path in paths if path.suffix != ".toml" and not _is_folder(path)]):
        reports.append(together)
        if not inspect.as_json:
            print("\n".join(together.lines()))  # noqa: T201
    if inspect.as_json:
        print(json.dumps([asdict(report) for report in reports], indent=2))  # noqa: T201
    return 1 if any(map(_is_bad, reports)) else 0


def _expanded(paths: Iterable[Path]) -> Iterator[Path]:
    """A folder that is no model's stands for the checkpoint files in it."""
    for path in paths:
        files: list[Path] = []
        with suppress(OSError):  # it is told where the folder is read
            if _is_folder(path) and not (path / "model_index.json").exists():
                files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".gguf"))
        yield from files or [path]


def _reports(path: Path) -> Iterator[Report]:
    if path.suffix == ".toml":
        yield from map(model_report, read_models(path))
    else:
        yield folder_report(path) if _is_folder(path) else file_report(path)


def _is_folder(path: Path) -> bool:
    with suppress(OSError):
        return path.is_dir()
    return False


def file_report(path: Path) -> FileReport:
    """Reads headers only."""
    report = FileReport(str(path), _FORMATS.get(path.suffix, "safetensors"))
    try:
        checkpoint = read_checkpoint(path)
    except BadCheckpoint as error:
        report.reason = str(error).removeprefix(f"{path.name}: ")
        return report
    _describe(report, checkpoint, checkpoint.tensors)
    return report


def _describe(report: FileReport, checkpoint: Checkpoint, tensors: Iterable[TensorSpec]) -> None:
    """Fill in what a checkpoint is, its tensors as they are or as they will be."""
    for tensor in tensors:
        amount = report.types.setdefault(tensor.dtype, Amount())
        amount.count += 1
        amount.size_bytes += tensor.size_bytes
    report.files = [file.path.name for file in checkpoint.files]
    _recognise(report, checkpoint)
    report.tensor_count = len(checkpoint.tensors)
    report.size_bytes = sum(amount.size_bytes for amount in report.types.values())


def model_report(entry: ModelEntry) -> FolderReport:
    """A model of models.toml as it will be in memory: its own files and types. Reads headers only."""
    report = FolderReport(entry.name)
    try:
        source = read_model(entry, EXTENT_BYTES)
    except BadCheckpoint as error:
        report.reason = str(error)
        return report
    report.pipeline_class = source.pipeline_class
    for part in source.components:
        path = part.checkpoint.files[0].path
        report.components[part.name] = one = FileReport(str(path), _FORMATS.get(path.suffix, "safetensors"))
        _describe(one, part.checkpoint, part.transform.stored(part.checkpoint.tensors))
    return report


def _recognise(report: FileReport, checkpoint: Checkpoint) -> None:
    shape = shape_of(checkpoint)
    report.architecture, report.dimensions = shape.architecture, shape.dimensions
    report.stated = checkpoint.files[0].stated
    if shape.architecture.role is Role.ALL_IN_ONE:
        for prefix, part in split(checkpoint).items():
            found = shape_of(part)
            count = len(part.tensors)
            report.parts[prefix] = PartReport(found.architecture, found.dimensions, count, part.size_bytes)
            if found.architecture.role is Role.DENOISER:
                shape = found
    if shape.architecture.role is Role.DENOISER:
        report.families = [family.name for family in families_for(shape)]


def folder_report(folder: Path) -> FolderReport:
    """The components that model_index.json names, those without params left out."""
    report = FolderReport(str(folder))
    try:
        index = read_index(folder)
        report.pipeline_class = str(index.get("_class_name", ""))
        for name in parts_of(index):
            _add_component(report, folder, name)
    except BadCheckpoint as error:
        report.reason = str(error)
    except OSError as error:
        report.reason = os.strerror(error.errno or 0)
    return report


def _add_component(report: FolderReport, folder: Path, name: str) -> None:
    try:
        path = pick_weights(folder / name, variant="")
    except BadCheckpoint as error:
        report.missing[name] = str(error)
        return
    if path:
        report.components[name] = file_report(path)


def _is_bad(report: Report | SetReport) -> bool:
    parts = report.components.values() if isinstance(report, FolderReport) else ()
    return bool(report.reason) or any(part.reason for part in parts)


def _lines(report: Report) -> Iterator[str]:
    if isinstance(report, FileReport):
        yield from _file_lines(report.path, report)
        return
    if report.reason:
        yield f"{report.path}: {report.reason}"
        return
    size_bytes = sum(part.size_bytes for part in report.components.values())
    kind = report.pipeline_class if report.pipeline_class.isprintable() else "a model"
    yield f"{report.path}: {kind}, {_size(size_bytes)}"
    for name, part in report.components.items():
        yield from (f"  {line}" for line in _file_lines(f"{name}/{Path(part.path).name}", part))
    for reason in report.missing.values():
        yield f"  missing: {reason}"


def _file_lines(name: str, report: FileReport) -> Iterator[str]:
    if report.reason:
        yield f"{name}: {report.reason}"
        return
    files = f" in {len(report.files)} files" if len(report.files) > 1 else ""
    tensors = "1 tensor" if report.tensor_count == 1 else f"{report.tensor_count} tensors"
    says = f", calls itself {report.stated}" if report.stated else ""
    what = Shape(report.architecture, report.dimensions)
    family = f", family {' or '.join(report.families)}" if report.families else ""
    yield f"{name}: {report.format}{files}, {tensors}, {_size(report.size_bytes)}, {what}{family}{says}"
    for prefix, part in report.parts.items():
        found = Shape(part.architecture, part.dimensions)
        yield f"  {prefix}*: {part.tensor_count} tensors, {_size(part.size_bytes)}, {found}"
    yield from _table(report.types)


def _table(types: Mapping[str, Amount]) -> Iterator[str]:
    for name, amount in sorted(types.items(), key=lambda item: -item[1].size_bytes):
        yield f"  {name:8}{amount.count:6}{_size(amount.size_bytes):>12}"


def _size(size_bytes: int) -> str:
    for unit, name in _UNITS:
        if size_bytes >= unit:
            return f"{size_bytes / unit:.2f} {name}"
    return f"{size_bytes} B"
