"""What the operator says: flags, checked once at start. The only reader of them. Imports no torch."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.rpc.logs import LOG_FORMATS, LOG_LEVELS, LogFormat
from services.sampler.requests import Numerics
from services.sampler.tiling import TiledDecode

PAGE_LOCKS = ("read-only", "protected", "staged")


class ConfigError(Exception):
    """A flag that cannot work; the message is for the operator and may name paths."""


@dataclass(frozen=True, slots=True)
class Config:
    """All settings of a sampler."""

    loader: str
    listen: tuple[str, ...]
    arena_dir: Path
    attach: tuple[str, ...]
    device: str
    max_vram_gib: float
    stream_layers: bool
    work_reserve_gib: float
    tiled_decode: TiledDecode
    page_lock: str
    gate_limit_bytes: int
    cuda_graphs: bool
    numerics: Numerics
    compile_cache: Path
    rider_limit: int
    queue_limit: int
    name: str
    grace_s: float
    metrics: str
    test_ring: bool
    log_format: LogFormat
    log_level: str


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """The configuration of a command line; argparse exits by itself for a wrong flag."""
    args = vars(_parser().parse_args(argv))
    return Config(listen=tuple(args.pop("listen")), attach=tuple(args.pop("attach")), **args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headwater-sampler",
        description="Draw pictures with the models of a loader, streaming params to the device as they are needed.",
    )
    add = parser.add_argument
    add("--loader", required=True, metavar="ADDRESS", help="the loader's unix:/path")
    add("--listen", required=True, action="append", metavar="ADDRESS", help="unix:/path or host:port; may be repeated")
    add("--arena-dir", type=Path, default=Path("/dev/shm/headwater"),
        help="the loader's folder (default: %(default)s)")  # fmt: skip
    add("--attach", action="append", default=[], metavar="MODEL",
        help="attach this model before serving, or say why it cannot be, and keep it attached; may be repeated "
        "(default: each when it is first asked for, until the loader needs its room)")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--max-vram", type=float, dest="max_vram_gib", default=-1.0, metavar="GIB",
        help="VRAM budget; negative: what is free less that; 0: all that is free (default: %(default)s)")  # fmt: skip
    add("--stream-layers", action=argparse.BooleanOptionalAction, default=True,
        help="keep what the budget holds on the device and stream the rest; without: keep nothing")  # fmt: skip
    add("--work-reserve", type=float, dest="work_reserve_gib", default=2.0, metavar="GIB",
        help="part of the budget for activations (default: %(default)s)")  # fmt: skip
    add("--tiled-decode", type=TiledDecode, choices=TiledDecode, default=TiledDecode.AUTO,
        metavar="{auto,never,always}", help="where a request does not say: decode in tiles, which changes pixels at "
        "seams; auto: those whose decode would take 5/8 of a positive --max-vram (default: auto)")  # fmt: skip
    add("--page-lock", choices=PAGE_LOCKS, default=PAGE_LOCKS[0],
        help="best way to try of reading shared memory at the bus's speed (default: %(default)s)")  # fmt: skip
    # A gate is a contiguous copy worth having, yet small enough that three of them fit a small budget.
    add("--gate-limit", type=_positive, dest="gate_limit_bytes", default=512 << 20, metavar="BYTES",
        help="largest gate that need not be split (default: %(default)s)")  # fmt: skip
    add("--cuda-graphs", action=argparse.BooleanOptionalAction, default=True,
        help="launch a denoiser's blocks as recorded graphs: same bits, far less work for the host")  # fmt: skip
    add("--numerics", type=Numerics, choices=Numerics, default=Numerics.EAGER, metavar="{eager,compiled}",
        help="eager: diffusers' own bits; compiled: blocks of denoisers compiled, faster (default: eager)")  # fmt: skip
    add("--compile-cache", type=Path, default=cache_home() / "headwater", metavar="DIR",
        help="folder of compiled programs, which replicas may share; who can write there can run code in them "
        "(default: %(default)s)")  # fmt: skip
    add("--riders", type=_positive, dest="rider_limit", default=4, metavar="N",
        help="pictures drawn at once (default: %(default)s)")  # fmt: skip
    add("--queue", type=_positive, dest="queue_limit", default=64, metavar="N",
        help="requests that may wait (default: %(default)s)")  # fmt: skip
    add("--name", default=socket.gethostname(), help="name of this replica (default: the host's)")
    add("--grace", type=float, dest="grace_s", default=30.0, metavar="S", help="seconds that running calls get at stop")
    add("--metrics", default="", metavar="HOST:PORT", help="serve Prometheus metrics there (default: nowhere)")
    add("--test-ring", action="store_true",
        help="on a CPU: copy params through slots filled with NaN when left, within a --max-vram above 0")  # fmt: skip
    add("--log-format", choices=LOG_FORMATS, default="text")
    add("--log-level", choices=LOG_LEVELS, default="info")
    return parser


def cache_home() -> Path:
    """Where this user's programs keep what they can make again, as the XDG base directory specification says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a whole number above 0")
    return int(text)
