"""Safetensors headers, read strictly and without trusting a byte of them.

Owns: what a checkpoint file claims (names, dtypes, shapes, byte ranges) and the proof that the claims hold together.
Reads headers only; tensor bytes are read by the loader's fill. Knows no model, no arena, no torch.
"""

import json
import math
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from services.errors import BadCheckpoint

MAX_HEADER_BYTES = 16 << 20
MAX_METADATA_BYTES = 1 << 20
MAX_TENSORS = 50_000
MAX_NAME_BYTES = 256
MAX_DIMS = 8
MAX_FILES = 1_000

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a checkpoint; `offset` is absolute in file number `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells one state of a file from another without reading it."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "FileIdentity":
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """One file: where it is, which state of it was read, and the digest of its header (32 hex digits)."""

    path: Path
    identity: FileIdentity
    header_digest: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Files and the tensors in them, in the order of the files."""

    files: tuple[CheckpointFile, ...]
    tensors: tuple[TensorSpec, ...]

    @property
    def size_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.tensors)


def read_checkpoint(path: Path) -> Checkpoint:
    """The tensors of one `.safetensors` file, or of the shards that a `.json` index lists.

    Raises BadCheckpoint, with base names only.
    """
    mapped = _read_index(path) if path.suffix == ".json" else {}
    names = list(dict.fromkeys(mapped.values())) if mapped else [path.name]
    files: list[CheckpointFile] = []
    tensors: list[TensorSpec] = []
    for number, name in enumerate(names):
        file, specs = read_header(path.parent / name, number)
        files.append(file)
        tensors += specs
        if len(tensors) > MAX_TENSORS:
            raise BadCheckpoint(f"{path.name}: more than {MAX_TENSORS} tensors")
    _check_index(path.name, mapped, names, tensors)
    if not tensors:
        raise BadCheckpoint(f"{path.name}: holds no tensors")
    return Checkpoint(tuple(files), tuple(tensors))


def read_header(path: Path, number: int = 0) -> tuple[CheckpointFile, list[TensorSpec]]:
    """One file's identity and tensors; `number` is what the tensors carry as `file`."""
    try:
        # Non-blocking, so that a pipe with a weights file's name cannot hold the loader.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise BadCheckpoint(f"{path.name}: {os.strerror(error.errno or 0)}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise BadCheckpoint(f"{path.name}: not a regular file")
        raw = _read_raw(fd, path.name, status.st_size)
    except OSError as error:
        raise BadCheckpoint(f"{path.name}: {os.strerror(error.errno or 0)}") from error
    finally:
        os.close(fd)
    tensors = parse_header(raw, path.name, status.st_size, number)
    return CheckpointFile(path, FileIdentity.of(status), xxhash.xxh3_128_hexdigest(raw)), tensors


def parse_header(raw: bytes, name: str, file_bytes: int, number: int = 0) -> list[TensorSpec]:
    """Tensors of the JSON `raw` that stands behind the 8-byte length, in file order.

    They tile the rest of the file: no hole, no overlap, no byte left over.
    """
    table = _load_json(raw, name)
    metadata = table.pop("__metadata__", {})
    if not _is_text_map(metadata) or sum(len(k) + len(v) for k, v in metadata.items()) > MAX_METADATA_BYTES:
        raise BadCheckpoint(f"{name}: __metadata__ is no map of text to text of at most 1 MiB")
    if len(table) > MAX_TENSORS:
        raise BadCheckpoint(f"{name}: more than {MAX_TENSORS} tensors")
    start = 8 + len(raw)
    tensors = [_tensor(name, key, value, start, number) for key, value in table.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size_bytes))
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            raise BadCheckpoint(f"{name}: tensor {tensor.name} leaves a hole or overlaps another")
        end += tensor.size_bytes
    if end != file_bytes:
        what = "truncated" if end > file_bytes else "longer than its header says"
        raise BadCheckpoint(f"{name}: {what}: {file_bytes} bytes, {end} expected")
    return tensors


def _read_raw(fd: int, name: str, file_bytes: int) -> bytes:
    head = os.pread(fd, 64, 0)
    if len(head) < 8:
        raise BadCheckpoint(f"{name}: {'empty' if not head else 'truncated'}")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER_BYTES or length < 2 or head[8:9] != b"{":
        raise BadCheckpoint(f"{name}: {_what_is(head)}")
    if 8 + length > file_bytes:
        raise BadCheckpoint(f"{name}: truncated inside its header: {file_bytes} bytes, at least {8 + length} expected")
    raw = os.pread(fd, length, 8)
    if len(raw) != length:
        raise BadCheckpoint(f"{name}: truncated while its header was read")
    return raw


def _what_is(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the weights: run `git lfs pull` where it came from"
    if head.lstrip()[:1] == b"<":
        return "an HTML page, not the weights: download the file again"
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return "a pickle, which this loader never opens: convert it to safetensors"
    if head[:4] == b"GGUF":
        return "a GGUF file, not safetensors"
    return f"not a safetensors file (a header of 2 bytes to {MAX_HEADER_BYTES >> 20} MiB was expected)"


def _load_json(raw: bytes, name: str) -> dict[str, Any]:
    seen = 0

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal seen
        seen += 1
        if seen > MAX_TENSORS + 2:  # stops here, before the rest is built
            raise BadCheckpoint(f"{name}: more than {MAX_TENSORS} tensors")
        table = dict(pairs)
        if len(table) != len(pairs):
            raise BadCheckpoint(f"{name}: a name stands twice in its header")
        return table

    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{name}: its header is no valid JSON") from error
    if not isinstance(table, dict):
        raise BadCheckpoint(f"{name}: its header is no JSON object")
    return table


def _no_constant(word: str) -> None:
    raise ValueError(word)


def _is_text_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _tensor(file: str, name: str, entry: Any, start: int, number: int) -> TensorSpec:
    if not 0 < len(name.encode("utf-8", "replace")) <= MAX_NAME_BYTES or not name.isprintable():
        raise BadCheckpoint(f"{file}: a tensor name is empty, longer than {MAX_NAME_BYTES} bytes or not printable")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise BadCheckpoint(f"{file}: tensor {name} is not described by dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise BadCheckpoint(f"{file}: tensor {name} has a dtype that is not known here")
    if not _are_sizes(shape) or len(shape) > MAX_DIMS:
        raise BadCheckpoint(f"{file}: tensor {name} has a shape that is no list of up to {MAX_DIMS} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise BadCheckpoint(f"{file}: tensor {name} has data_offsets that are no two sizes")
    size = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != size:
        raise BadCheckpoint(f"{file}: tensor {name} has {offsets[1] - offsets[0]} bytes, its shape needs {size}")
    return TensorSpec(name, dtype, tuple(shape), number, start + offsets[0], size)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _read_index(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise BadCheckpoint(f"{path.name}: larger than {MAX_HEADER_BYTES >> 20} MiB")
        raw = path.read_bytes()
    except OSError as error:
        raise BadCheckpoint(f"{path.name}: {os.strerror(error.errno or 0)}") from error
    mapped = _load_json(raw, path.name).get("weight_map")
    if not isinstance(mapped, dict) or not mapped or not _is_text_map(mapped):
        raise BadCheckpoint(f"{path.name}: has no weight_map of tensor names to files")
    shards = set(mapped.values())
    if len(shards) > MAX_FILES or not all(_is_shard_name(shard) for shard in shards):
        raise BadCheckpoint(f"{path.name}: names a shard that is no .safetensors file beside it")
    return mapped


def _is_shard_name(name: str) -> bool:
    return name.endswith(".safetensors") and name.isprintable() and "/" not in name and len(name) <= MAX_NAME_BYTES


def _check_index(name: str, mapped: dict[str, str], files: list[str], tensors: Iterable[TensorSpec]) -> None:
    """Every tensor once, and every one of the index where the index says; tensors it leaves out are taken too."""
    found: dict[str, str] = {}
    for tensor in tensors:
        if tensor.name in found:
            raise BadCheckpoint(f"{name}: tensor {tensor.name} stands in two files")
        found[tensor.name] = files[tensor.file]
    for key, shard in mapped.items():
        if found.get(key) != shard:
            raise BadCheckpoint(f"{name}: tensor {key[:MAX_NAME_BYTES]!r} is not in the shard that the index names")
