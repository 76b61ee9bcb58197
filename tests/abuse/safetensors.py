"""Safetensors files that are refused."""

import json
import struct
from typing import Any

from services.params.specs import MAX_TENSORS


def entry(dtype: Any = "F32", shape: Any = (2,), start: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def file_of(header: Any, data: bytes = b"\0" * 8) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "few bytes": (b"abc", "truncated"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git-lfs"),
    "html": (b"<!DOCTYPE html><html></html>", "HTML"),
    "html after blanks": (b"\n\n  <html>" + b" " * 60, "HTML"),
    "zip pickle": (b"PK\x03\x04" + b"\0" * 60, "pickle"),
    "raw pickle": (b"\x80\x04\x95" + b"\xff" * 60, "pickle"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 60, "GGUF"),
    "header length 0": (struct.pack("<Q", 0) + b"\0" * 8, "not a safetensors file"),
    "header length 2^63": (struct.pack("<Q", 1 << 63) + b"{}", "not a safetensors file"),
    "header of 16 MiB and a byte": (struct.pack("<Q", (16 << 20) + 1) + b"{" + b" " * 99, "not a safetensors file"),
    "header past the end": (struct.pack("<Q", 4096) + b"{}", "truncated"),
    "not JSON": (file_of(b"{nonsense}"), "JSON"),
    "not UTF-8": (file_of(b'{"\xff\xfe": 1}'), "JSON"),
    "NaN": (file_of(b'{"a": NaN}'), "JSON"),
    "depth bomb": (file_of(nested(100_000)), "JSON"),
    "list": (struct.pack("<Q", 4) + b"[1] ", "not a safetensors file"),
    "number of 5000 digits": (file_of(b'{"a":' + b"9" * 5000 + b"}"), "JSON"),
    "name twice": (
        file_of(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
        "twice",
    ),
    "key twice in a tensor": (file_of(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2]}}'), "twice"),
    "too many tensors": (
        file_of({f"t{n}": entry(shape=[0], end=0) for n in range(MAX_TENSORS + 3)}, b""),
        "more than 50000 tensors",
    ),
    "metadata no text": (file_of({"__metadata__": {"a": 1}, "a": entry()}), "__metadata__"),
    "metadata of 2 MiB": (file_of({"__metadata__": {"a": "x" * (2 << 20)}, "a": entry()}), "__metadata__"),
    "empty name": (file_of({"": entry()}), "name"),
    "NUL in a name": (file_of({"a\0b": entry()}), "name"),
    "newline in a name": (file_of({"a\nb": entry()}), "name"),
    "lone surrogate in a name": (file_of(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), "name"),
    "long name": (file_of({"n" * 257: entry()}), "name"),
    "tensor is a list": (file_of({"a": []}), "dtype, shape"),
    "unknown field": (file_of({"a": entry() | {"more": 1}}), "dtype, shape"),
    "missing field": (file_of({"a": {"dtype": "F32", "shape": [2]}}), "dtype, shape"),
    "unknown dtype": (file_of({"a": entry(dtype="F31")}), "dtype"),
    "dtype is a list": (file_of({"a": entry(dtype=["F32"])}), "dtype"),
    "negative dim": (file_of({"a": entry(shape=[-2])}), "shape"),
    "float dim": (file_of({"a": entry(shape=[2.0])}), "shape"),
    "true as a dim": (file_of({"a": entry(shape=[True, 2])}), "shape"),
    "dim of 2^64": (file_of({"a": entry(shape=[1 << 64])}), "shape"),
    "nine dims": (file_of({"a": entry(shape=[1] * 8 + [2])}), "shape"),
    "product overflows": (file_of({"a": entry(shape=[1 << 62, 1 << 62])}), "bytes, its shape needs"),
    "size is not the product": (file_of({"a": entry(shape=[3])}), "its shape needs 12"),
    "reversed offsets": (file_of({"a": entry(start=8, end=0)}), "its shape needs"),
    "negative offsets": (file_of({"a": entry(start=-8, end=0)}), "data_offsets"),
    "three offsets": (file_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}), "data_offsets"),
    "overlap": (file_of({"a": entry(), "b": entry(start=4, end=12)}, b"\0" * 12), "overlaps"),
    "the same bytes twice": (file_of({"a": entry(), "b": entry()}), "overlaps"),
    "hole": (file_of({"a": entry(), "b": entry(start=12, end=20)}, b"\0" * 20), "hole"),
    "hole at the start": (file_of({"a": entry(start=4, end=12)}, b"\0" * 12), "hole"),
    "data truncated": (file_of({"a": entry()}, b"\0" * 7), "truncated"),
    "data too long": (file_of({"a": entry()}, b"\0" * 9), "longer than its header"),
    "no tensors": (file_of({}, b""), "no tensors"),
}  # fmt: skip
