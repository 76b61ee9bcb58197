"""Safetensors headers, read strictly and without trusting a byte of them.

Source of the format: https://github.com/huggingface/safetensors#format. Knows no model, no arena, no torch.
"""

import json
import math
import os
from typing import Any

from services.errors import BadCheckpoint
from services.params.specs import MAX_DIMS, MAX_TENSORS, TensorSpec, check_name, what_is

MAX_HEADER_BYTES = 16 << 20
MAX_METADATA_BYTES = 1 << 20
WANTED = f"safetensors file (a header of 2 bytes to {MAX_HEADER_BYTES >> 20} MiB was expected)"

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


def parse_header(raw: bytes, name: str, file_bytes: int, number: int = 0) -> list[TensorSpec]:
    """Tensors of the JSON `raw` that stands behind the 8-byte length, in file order.

    They tile the rest of the file: no hole, no overlap, no byte left over.
    """
    if raw.count(b'"data_offsets"') > MAX_TENSORS + 1:  # one may be the name of a tensor; no need to parse the rest
        raise BadCheckpoint(f"{name}: more than {MAX_TENSORS} tensors")
    table = load_json(raw, name)
    metadata = table.pop("__metadata__", {})
    if not is_text_map(metadata) or sum(len(k) + len(v) for k, v in metadata.items()) > MAX_METADATA_BYTES:
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


def read_raw(fd: int, name: str, file_bytes: int) -> bytes:
    """The JSON of an open file. Raises BadCheckpoint, OSError."""
    head = os.pread(fd, 64, 0)
    if len(head) < 8:
        raise BadCheckpoint(f"{name}: {'empty' if not head else 'truncated'}")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER_BYTES or length < 2 or head[8:9] != b"{":
        raise BadCheckpoint(f"{name}: {what_is(head, WANTED)}")
    if 8 + length > file_bytes:
        raise BadCheckpoint(f"{name}: truncated inside its header: {file_bytes} bytes, at least {8 + length} expected")
    raw = os.pread(fd, length, 8)
    if len(raw) != length:
        raise BadCheckpoint(f"{name}: truncated while its header was read")
    return raw


def load_json(raw: bytes, name: str) -> dict[str, Any]:
    """A JSON object in which no name stands twice, of as many objects as there may be tensors."""
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


def is_text_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _tensor(file: str, name: str, entry: Any, start: int, number: int) -> TensorSpec:
    check_name(file, name)
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
