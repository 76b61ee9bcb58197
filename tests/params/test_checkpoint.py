"""Safetensors headers: what is refused, in which words, and that what is accepted is what the library reads."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from services.errors import BadCheckpoint
from services.params.checkpoint import MAX_TENSORS, parse_header, read_checkpoint

DTYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "U8": np.uint8}


def entry(dtype: Any = "F32", shape: Any = (2,), start: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def file_of(header: Any, data: bytes = b"\0" * 8) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


ABUSE: dict[str, tuple[bytes, str]] = {
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


@pytest.mark.parametrize("case", ABUSE)
def test_abuse_is_refused_in_plain_words(case: str, tmp_path: Path) -> None:
    """Each malformed file is BadCheckpoint, says what is wrong, and names the file but no folder."""
    raw, words = ABUSE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)

    with pytest.raises(BadCheckpoint) as caught:
        read_checkpoint(path)

    assert words in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_missing_file_a_folder_and_a_pipe_are_refused(tmp_path: Path) -> None:
    """None of them hangs or shows a path."""
    (tmp_path / "folder.safetensors").mkdir()
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)

    for name in ("missing.safetensors", "folder.safetensors", "pipe.safetensors"):
        with pytest.raises(BadCheckpoint, match=name) as caught:
            read_checkpoint(tmp_path / name)
        assert str(tmp_path) not in str(caught.value)


def test_what_the_library_reads_is_what_the_specs_say(tmp_path: Path) -> None:
    """Bytes at the offsets of the specs are the library's tensors."""
    tensors = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a.1": np.ones(5, np.uint8),
        "e": np.zeros((0,), np.int64),
    }
    path = tmp_path / "m.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})

    checkpoint = read_checkpoint(path)

    raw, loaded = path.read_bytes(), load_file(path)
    assert {spec.name for spec in checkpoint.tensors} == set(loaded)
    for spec in checkpoint.tensors:
        assert raw[spec.offset : spec.offset + spec.size_bytes] == loaded[spec.name].tobytes()
        assert spec.shape == loaded[spec.name].shape


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=30),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=4)),
        min_size=1,
        max_size=12,
    )
)
def test_round_trip_against_the_library(tmp_path_factory: pytest.TempPathFactory, table: dict[str, Any]) -> None:
    """Whatever the library writes is read back with the same names, dtypes, shapes and bytes."""
    table.pop("__metadata__", None)
    random = np.random.default_rng(0)
    tensors = {name: random.integers(0, 99, shape).astype(DTYPES[dtype]) for name, (dtype, shape) in table.items()}
    tensors["anchor"] = np.zeros(1, np.uint8)
    path = tmp_path_factory.mktemp("round") / "m.safetensors"
    save_file(tensors, path)

    checkpoint = read_checkpoint(path)

    raw = path.read_bytes()
    read = {t.name: (t.dtype, t.shape, raw[t.offset : t.offset + t.size_bytes]) for t in checkpoint.tensors}
    by_type = {np.dtype(value): word for word, value in DTYPES.items()}
    assert read == {name: (by_type[tensor.dtype], tensor.shape, tensor.tobytes()) for name, tensor in tensors.items()}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_mutated_header_is_read_or_refused(data: st.DataObject) -> None:
    """No byte change gives anything but tensors inside the file, apart from each other, or BadCheckpoint."""
    header = bytearray(
        json.dumps({"a": entry(), "b.1": entry(start=8, end=16), "c": entry("I64", [1], 16, 24)}).encode()
    )
    for _ in range(data.draw(st.integers(1, 3))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    size = 8 + len(header) + 24

    try:
        tensors = parse_header(bytes(header), "m.safetensors", size)
    except BadCheckpoint:
        return

    assert sum(tensor.size_bytes for tensor in tensors) == 24
    assert all(tensor.offset >= 8 + len(header) and tensor.offset + tensor.size_bytes <= size for tensor in tensors)


def write_index(folder: Path, weight_map: Any) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    """Tensors of all shards, numbered by file; a tensor that the index leaves out is taken too."""
    save_file({"a": np.ones(2, np.float32), "extra": np.ones(1, np.float32)}, tmp_path / "s1.safetensors")
    save_file({"b": np.ones(3, np.float32)}, tmp_path / "s2.safetensors")

    checkpoint = read_checkpoint(write_index(tmp_path, {"a": "s1.safetensors", "b": "s2.safetensors"}))

    names = [file.path.name for file in checkpoint.files]
    assert {(t.name, names[t.file]) for t in checkpoint.tensors} == {
        ("a", "s1.safetensors"),
        ("extra", "s1.safetensors"),
        ("b", "s2.safetensors"),
    }


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({}, "no weight_map"),
        ({"a": 1}, "no weight_map"),
        ({"a": "../s1.safetensors"}, "names a shard"),
        ({"a": "/etc/passwd"}, "names a shard"),
        ({"a": "s1.bin"}, "names a shard"),
        ({"a": "s3.safetensors"}, "No such file"),
        ({"z": "s1.safetensors"}, "not in the shard"),
        ({"a": "s1.safetensors", "c": "s2.safetensors"}, "stands in two files"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, weight_map: Any, words: str) -> None:
    """An index can name only safetensors files beside it, and only what they hold."""
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "s1.safetensors")
    save_file({"a": np.ones(2, np.float32), "c": np.ones(2, np.float32)}, tmp_path / "s2.safetensors")

    with pytest.raises(BadCheckpoint, match=words) as caught:
        read_checkpoint(write_index(tmp_path, weight_map))
    assert str(tmp_path) not in str(caught.value)
