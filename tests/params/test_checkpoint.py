"""Safetensors headers: what is refused, in which words, and that what is accepted is what the library reads."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from services.errors import BadCheckpoint
from services.params.checkpoint import joined, read_checkpoint
from services.params.safetensors_header import parse_header
from tests.abuse.gguf import TEXT, file_of, pair, text
from tests.abuse.safetensors import entry

DTYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "U8": np.uint8}


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


def test_checkpoints_are_joined_in_their_order(tmp_path: Path) -> None:
    """Each tensor keeps its place in its own file; a name in two files is refused, by both."""
    for name, number in (("a", 1), ("b", 2), ("c", 1)):
        save_file({f"t.{number}": np.full(3, number, np.uint8)}, tmp_path / f"{name}.safetensors")
    a, b, c = (read_checkpoint(tmp_path / f"{name}.safetensors") for name in "abc")

    both = joined([a, b])

    assert [file.path.name for file in both.files] == ["a.safetensors", "b.safetensors"]
    held = [both.files[t.file].path.read_bytes()[t.offset : t.offset + t.size_bytes] for t in both.tensors]
    assert held == [b"\x01\x01\x01", b"\x02\x02\x02"]
    with pytest.raises(BadCheckpoint, match=r"t\.1 stands in two files of one component, a.safetensors and c.safet"):
        joined([a, b, c])


@pytest.mark.parametrize(
    ("word", "stated"), [("qwen3", "qwen3"), ("two words", ""), ("x" * 33, ""), ("\x1b[31m", ""), ("", "")]
)
def test_a_file_may_state_its_architecture(tmp_path: Path, word: str, stated: str) -> None:
    """A GGUF file's word is kept if it is one that can be shown."""
    path = tmp_path / "m.gguf"
    path.write_bytes(file_of(pairs=(pair("general.architecture", TEXT, text(word)),)))

    assert read_checkpoint(path).files[0].stated == stated
