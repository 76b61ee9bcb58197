"""What a checkpoint says of its tensors, whatever its format, and the limits that hold for all formats."""

import os
from dataclasses import dataclass
from pathlib import Path

from services.errors import BadCheckpoint

MAX_TENSORS = 50_000
MAX_NAME_BYTES = 256
MAX_DIMS = 8


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
    """One file: where it is, which state of it was read, and the digest of its header (32 hex digits).

    stated: the file's own word for its architecture; empty if it has none.
    """

    path: Path
    identity: FileIdentity
    header_digest: str
    stated: str = ""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Files and the tensors in them, in the order of the files.

    part: empty, or the prefix of the names of those tensors in the files that these are.
    """

    files: tuple[CheckpointFile, ...]
    tensors: tuple[TensorSpec, ...]
    part: str = ""

    @property
    def size_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.tensors)


def check_name(file: str, name: str) -> None:
    """Raises BadCheckpoint for a tensor's name that logs, listings and the manifest should not have to carry."""
    if not 0 < len(name.encode("utf-8", "replace")) <= MAX_NAME_BYTES or not name.isprintable():
        raise BadCheckpoint(f"{file}: a tensor name is empty, longer than {MAX_NAME_BYTES} bytes or not printable")


def what_is(head: bytes, wanted: str) -> str:
    """Why a file that begins so is not what was wanted."""
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the weights: run `git lfs pull` where it came from"
    if head.lstrip()[:1] == b"<":
        return "an HTML page, not the weights: download the file again"
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return "a pickle, which this loader never opens: convert it to safetensors"
    if head[:4] == b"GGUF":
        return "a GGUF file, not safetensors"
    return f"not a {wanted}"
