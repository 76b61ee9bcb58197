"""The tensors of a checkpoint: one file, or the shards of an index, of the formats that are read here.

Reads headers only; tensor bytes are read by the loader's fill.
"""

import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import xxhash

from services.errors import BadCheckpoint
from services.params import gguf_header
from services.params.safetensors_header import MAX_HEADER_BYTES, is_text_map, load_json, parse_header, read_raw
from services.params.specs import MAX_NAME_BYTES, MAX_TENSORS, Checkpoint, CheckpointFile, FileIdentity, TensorSpec

MAX_FILES = 1_000


def read_checkpoint(path: Path) -> Checkpoint:
    """The tensors of one `.safetensors` or `.gguf` file, or of the shards that a `.json` index lists.

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


def joined(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """One checkpoint of at least one, whose tensors have names of their own. Raises BadCheckpoint."""
    if len(checkpoints) == 1:
        return checkpoints[0]
    files: list[CheckpointFile] = []
    tensors: dict[str, TensorSpec] = {}
    for checkpoint in checkpoints:
        for tensor in checkpoint.tensors:
            if twin := tensors.get(tensor.name):
                names = f"{files[twin.file].path.name} and {checkpoint.files[tensor.file].path.name}"
                raise BadCheckpoint(f"tensor {tensor.name} stands in two files of one component, {names}")
            tensors[tensor.name] = replace(tensor, file=len(files) + tensor.file)
        files += checkpoint.files
    if len(tensors) > MAX_TENSORS:
        raise BadCheckpoint(f"{files[0].path.name} and others: more than {MAX_TENSORS} tensors")
    return Checkpoint(tuple(files), tuple(tensors.values()), " ".join(filter(None, (c.part for c in checkpoints))))


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
        raw, stated, tensors = _read_format(fd, path, status.st_size, number)
    except OSError as error:
        raise BadCheckpoint(f"{path.name}: {os.strerror(error.errno or 0)}") from error
    finally:
        os.close(fd)
    return CheckpointFile(path, FileIdentity.of(status), xxhash.xxh3_128_hexdigest(raw), stated), tensors


def _read_format(fd: int, path: Path, file_bytes: int, number: int) -> tuple[bytes, str, list[TensorSpec]]:
    """(the header's bytes, its word for the architecture, tensors); a file is what its name says, or refused."""
    if path.suffix == ".gguf":
        header = gguf_header.read_header(lambda at, size: os.pread(fd, size, at), path.name, file_bytes, number)
        return header.raw, _word(header.metadata.get("general.architecture")), header.tensors
    raw = read_raw(fd, path.name, file_bytes)
    return raw, "", parse_header(raw, path.name, file_bytes, number)


def _word(value: object) -> str:
    """A value of the metadata if it is fit to be shown."""
    return value if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,32}", value) else ""


def _read_index(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise BadCheckpoint(f"{path.name}: larger than {MAX_HEADER_BYTES >> 20} MiB")
        raw = path.read_bytes()
    except OSError as error:
        raise BadCheckpoint(f"{path.name}: {os.strerror(error.errno or 0)}") from error
    mapped = load_json(raw, path.name).get("weight_map")
    if not isinstance(mapped, dict) or not mapped or not is_text_map(mapped):
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
