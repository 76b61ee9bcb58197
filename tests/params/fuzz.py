"""Mutates checkpoint headers: each is read, or refused as ours, soon and in little memory.

    python -m tests.params.fuzz gguf --count 5000000

Seeds are small good files and those of tests/abuse. Exits with 1 if there was a finding; the input stays in a file.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from services.errors import BadCheckpoint
from services.params.checkpoint import read_checkpoint
from services.params.specs import Checkpoint
from tests.abuse import gguf, safetensors

HANG_S = 2.0
MEMORY_BYTES = 64 << 20
SEED_BYTES = 4096  # larger files of the abuse folder are slow to mutate, and show what size alone shows
EDGES = (0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 255, 256, 257, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
WIDE_EDGES = (*EDGES, 1 << 32, (1 << 62) + 8, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 8, (1 << 64) - 1)
ODD: tuple[object, ...] = (
    -1,
    0,
    True,
    None,
    2.0,
    1e400,
    "",
    "F64",
    "x" * 300,
    [],
    {},
    [[]],
    1 << 63,
    1 << 64,
    -(1 << 63),
)

GOOD = {
    "gguf": [
        gguf.file_of(),
        gguf.file_of(
            (gguf.tensor("a.weight", (32, 4), gguf.Q8_0), gguf.tensor("b", (8,), gguf.F16, 160)),
            (
                gguf.u32("general.alignment", 32),
                gguf.pair("general.architecture", gguf.TEXT, gguf.text("flux")),
                gguf.array("tokenizer.ggml.tokens", gguf.TEXT, 3, gguf.text("a") * 3),
                gguf.array("tokenizer.ggml.scores", 6, 3, bytes(12)),
                gguf.pair("a.switch", gguf.BOOL, b"\1"),
            ),
            bytes(176),
        ),
    ],
    "safetensors": [
        safetensors.file_of({"a": safetensors.entry()}),
        safetensors.file_of(
            {
                "__metadata__": {"format": "pt"},
                "a.0.weight": safetensors.entry("BF16", [2, 3], 0, 12),
                "a.0.bias": safetensors.entry("F32", [], 12, 16),
                "b": safetensors.entry("I64", [1, 1], 16, 24),
            },
            bytes(24),
        ),
    ],
}
ABUSE = {"gguf": gguf.FILES, "safetensors": safetensors.FILES}


class Hang(BaseException):
    """An input that took too long; no reader may catch it."""


@dataclass
class Outcome:
    """What a run saw."""

    count: int = 0
    read: int = 0
    slowest_s: float = 0.0
    findings: list[str] = field(default_factory=list)
    inputs: list[bytes] = field(default_factory=list)


def seeds(format_: str) -> list[bytes]:
    abuse = [raw for raw, _ in ABUSE[format_].values() if 0 < len(raw) <= SEED_BYTES]
    return [*(GOOD[format_] * max(1, len(abuse) // 4)), *abuse]


def mutated(chance: random.Random, format_: str, files: Sequence[bytes]) -> bytes:
    """One of `files` with up to four changes, of bytes or, in every other JSON, of values."""
    if format_ == "safetensors" and chance.randrange(2):
        return with_other_values(chance, chance.choice(GOOD[format_]))
    raw = bytearray(chance.choice(files))
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(raw) + 1)
        match chance.randrange(8):
            case 0 if at < len(raw):
                raw[at] ^= 1 << chance.randrange(8)
            case 1 if at < len(raw):
                raw[at] = chance.randrange(256)
            case 2:
                raw[at : at + 4] = struct.pack("<I", chance.choice(EDGES))
            case 3:
                raw[at : at + 8] = struct.pack("<Q", chance.choice(WIDE_EDGES))
            case 4:
                del raw[at : at + chance.choice((1, 4, 8, 64))]
            case 5:
                raw[at:at] = raw[at : at + chance.choice((1, 8, 40))]
            case 6:
                other = chance.choice(files)
                raw[at:] = other[chance.randrange(len(other) + 1) :]
            case _:
                raw[at : at + 1] = str(chance.choice(WIDE_EDGES)).encode()
        if not raw:
            raw += b"\0"
    return bytes(raw)


def with_other_values(chance: random.Random, raw: bytes) -> bytes:
    """A good safetensors file whose header is JSON of its length still, with up to four other values."""
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    for _ in range(chance.randint(1, 4)):
        holder, key = chance.choice(list(places(header)))
        match chance.randrange(4):
            case 0:
                holder[key] = copy.deepcopy(chance.choice(ODD))
            case 1 if isinstance(holder[key], int):
                holder[key] += chance.choice((-8, -1, 1, 8))
            case 2 if isinstance(holder, dict):
                del holder[key]
            case _:
                other, place = chance.choice(list(places(header)))
                holder[key] = copy.deepcopy(other[place])
        if not header:
            break
    return safetensors.file_of(header, data)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(list or object, index or key) of every value in some JSON."""
    keys = range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


def wrong_with(checkpoint: Checkpoint, file_bytes: int) -> str:
    """What an accepted file has that it must not have."""
    end = 0
    for tensor in sorted(checkpoint.tensors, key=lambda tensor: (tensor.offset, tensor.size_bytes)):
        if tensor.offset < end or tensor.size_bytes < 0 or tensor.offset + tensor.size_bytes > file_bytes:
            return f"tensor {tensor.name} overlaps another or the end of the file"
        end = tensor.offset + tensor.size_bytes
    names = [tensor.name for tensor in checkpoint.tensors]
    return "" if len(set(names)) == len(names) else "a name stands twice"


def fuzz(
    format_: str, count: int, seed: int, read: Callable[[Path], Checkpoint] = read_checkpoint, most_findings: int = 1
) -> Outcome:
    """Give `read` so many mutated files; stops at the first findings."""
    outcome, chance, files = Outcome(), random.Random(seed), seeds(format_)

    def hang(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, hang)
    try:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            path = Path(folder) / f"model.{format_}"
            while outcome.count < count and len(outcome.findings) < most_findings:
                raw = mutated(chance, format_, files)
                path.write_bytes(raw)
                outcome.count += 1
                _try(read, path, raw, outcome)
    finally:
        signal.signal(signal.SIGALRM, before)
    return outcome


def _try(read: Callable[[Path], Checkpoint], path: Path, raw: bytes, outcome: Outcome) -> None:
    start = time.perf_counter()
    finding = ""
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    try:
        finding = wrong_with(read(path), len(raw))
        outcome.read += 1
    except BadCheckpoint:
        pass
    except Hang:
        finding = f"longer than {HANG_S} s"
    except Exception as error:  # whatever else comes is what is looked for
        finding = f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    outcome.slowest_s = max(outcome.slowest_s, time.perf_counter() - start)
    if finding:
        outcome.findings.append(finding)
        outcome.inputs.append(raw)


def limit_memory() -> None:
    """From here on more than a header's memory is a MemoryError, which is a finding."""
    size = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
    limit = int(size.split()[1]) * 1024 + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=GOOD)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    limit_memory()
    start = time.perf_counter()
    outcome = fuzz(options.format, options.count, options.seed)
    for number, raw in enumerate(outcome.inputs):
        Path(f"finding-{number}.{options.format}").write_bytes(raw)
    figures = {
        "format": options.format,
        "count": outcome.count,
        "read": outcome.read,
        "slowest_ms": outcome.slowest_s * 1e3,
        "seconds": time.perf_counter() - start,
        "findings": outcome.findings,
    }
    print(json.dumps(figures))
    return 1 if outcome.findings else 0


if __name__ == "__main__":
    sys.exit(main())
