"""The loader's command line: flags, checked once, at start."""

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from services.loader.entries import ModelEntry, parse_added, read_entries
from services.params.layout import EXTENT_BYTES, PAGE
from services.params.placement import Placement, parse_placement
from services.rpc.logs import LOG_FORMATS, LOG_LEVELS, LogFormat

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


@dataclass(frozen=True, slots=True)
class Config:
    """All settings of a loader. `models` are those of `models_file` and those that were `added` by flags."""

    models: tuple[ModelEntry, ...]
    models_file: Path | None
    added: tuple[ModelEntry, ...]
    listen: str
    allowed_users: tuple[int, ...]
    arena_dir: Path
    allow_disk: bool
    eager_load: bool
    host_budget_bytes: int | None
    fill_threads: int
    max_fill_rate: int | None
    buffered_io: bool
    pressure_limit_percent: float
    extent_bytes: int
    numa: Placement | None
    grace_s: float
    log_format: LogFormat
    log_level: str


@dataclass(frozen=True, slots=True)
class Upkeep:
    """What is to be done with an arena folder in place of serving from it."""

    task: Literal["check", "clean"]
    arena_dir: Path
    fill_threads: int


@dataclass(frozen=True, slots=True)
class Inspect:
    """Files and folders to be described in place of serving."""

    paths: tuple[Path, ...]
    as_json: bool


def parse_args(argv: Sequence[str] | None = None) -> Config | Upkeep | Inspect:
    """What a command line asks for. Raises ConfigError; argparse exits by itself for a wrong flag."""
    parser = _parser()
    args = vars(parser.parse_args(argv))
    inspected, as_json = args.pop("inspect"), args.pop("json")
    if as_json and not inspected:
        parser.error("--json goes with --inspect")
    if inspected:
        return Inspect(tuple(inspected), as_json)
    if task := args.pop("task"):
        return Upkeep(task, args["arena_dir"], args["fill_threads"])
    file, texts = args.pop("models"), args.pop("add")
    if args["listen"] is None or not (file or texts):
        parser.error("--listen is required, and --models or --add")
    added = tuple(map(parse_added, texts))
    users = tuple(args.pop("allow_uid"))
    return Config(models=read_entries(file, added), models_file=file, added=added, allowed_users=users, **args)


def parse_size(text: str) -> int:
    """Bytes of `64GiB`, `100MB`, `1.5 GiB` or `4096`. Raises ValueError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is no size such as 64GiB or 100MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _size(text: str) -> int:
    try:
        size = parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if size <= 0:
        raise argparse.ArgumentTypeError("must be more than 0")
    return size


def _extent_size(text: str) -> int:
    if (size := _size(text)) % PAGE:
        raise argparse.ArgumentTypeError(f"must be a multiple of {PAGE}")
    return size


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 256:
        raise argparse.ArgumentTypeError("must be a number from 1 to 256")
    return int(text)


def _thread_count() -> int:
    """A disk wants many reads at once, also while some threads put in place what they have read."""
    return min(16, 4 * len(os.sched_getaffinity(0)))


def _percent(text: str) -> float:
    try:
        percent = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError("must be a number") from error
    if not 0 <= percent <= 100:
        raise argparse.ArgumentTypeError("must be from 0 to 100")
    return percent


def _placement(text: str) -> Placement | None:
    try:
        return parse_placement(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError("must be off, interleave, or node numbers such as 0 or 0,1") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headwater-loader",
        description="Keep one shared-memory copy of each model's params and fill it from disk as it is asked.",
    )
    add = parser.add_argument
    add("--models", type=Path,
        help="models.toml: a table [models.NAME] for each model, with a folder, a checkpoint or files")  # fmt: skip
    add("--add", action="append", default=[], metavar="NAME=PATH[,PATH...]",
        help="serve this diffusers folder too, without a line in models.toml; or these files, whose components their "
        "tensors tell, with family=..., tokenizer=FOLDER or COMPONENT=FILE among them; type=q8_0 packs them as they "
        "are read; may be repeated")  # fmt: skip
    add("--listen", metavar="ADDRESS", help="unix:/path (mode 0660) or host:port")
    add("--allow-uid", type=int, action="append", default=[], metavar="UID",
        help="let this user call over the socket too; may be repeated (always: the loader's own, root)")  # fmt: skip
    task = parser.add_mutually_exclusive_group()
    for name, text in (("check", "compare all that is filled with its digests"), ("clean", "remove what nobody owns")):
        task.add_argument(f"--{name}", dest="task", action="store_const", const=name, help=f"{text}, and do not serve")
    task.add_argument("--inspect", type=Path, nargs="+", metavar="PATH",
        help="tell what checkpoint files and model folders hold and are together, and what models of a models.toml "
        "will be in memory; do not serve")  # fmt: skip
    add("--json", action="store_true", help="with --inspect: print one JSON document")
    add("--arena-dir", type=Path, default=Path("/dev/shm/headwater"), help="folder on a tmpfs (default: %(default)s)")
    add("--allow-disk", action="store_true", help="accept an arena folder that is not on a tmpfs")
    add("--eager-load", action="store_true", help="fill all models now, not when they are asked for")
    add("--host-budget", type=_size, dest="host_budget_bytes", metavar="SIZE", help="most bytes of arenas, e.g. 64GiB")
    add("--fill-threads", type=_count, default=_thread_count(), metavar="N",
        help="threads that read (default: 4 for each CPU, at most 16; here: %(default)s)")  # fmt: skip
    add("--max-fill-rate", type=_size, metavar="SIZE", help="most bytes a second to read from disk")
    add("--buffered-io", action="store_true", help="read through the page cache instead of around it")
    add("--pressure-limit", type=_percent, dest="pressure_limit_percent", default=10.0, metavar="PERCENT",
        help="give back what nobody uses while tasks wait for memory that much of the time; 0: never "
        "(default: %(default)g)")  # fmt: skip
    add("--extent-bytes", type=_extent_size, default=EXTENT_BYTES, metavar="SIZE", help="unit of fill (default: 64MiB)")
    add("--numa", type=_placement, metavar="NODES",
        help="nodes to take the memory of new arenas from while they have some, e.g. 0 or 0,1; interleave: all in turn "
        "(default: off, that of the thread that reads)")  # fmt: skip
    add("--grace", type=float, dest="grace_s", default=5.0, metavar="S", help="seconds that running calls get at stop")
    add("--log-format", choices=LOG_FORMATS, default="text")
    add("--log-level", choices=LOG_LEVELS, default="info")
    return parser
