"""GGUF headers: what is refused, in which words, and that what is accepted is what the library wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from services.errors import BadCheckpoint
from services.params.checkpoint import read_checkpoint
from services.params.gguf_header import PACKINGS, read_header
from tests.abuse.gguf import array, file_of, tensor, text

TYPES = [GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0]


def test_packings_are_the_librarys() -> None:
    """Names, numbers and block sizes of every type that the gguf package knows."""
    theirs = {int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}
    assert {number: tuple(packing) for number, packing in PACKINGS.items()} == theirs


def written(path: Path, tensors: dict[str, tuple[Any, np.ndarray]], alignment: int = 32) -> None:
    """A file as the gguf package writes it, with a tokenizer's arrays and each kind of value."""
    writer = gguf.GGUFWriter(path, "qwen3")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_name("Größe")
    writer.add_block_count(36)
    writer.add_rope_freq_base(1e6)
    writer.add_bool("a.switch", True)
    writer.add_token_list(["a", "", "ü" * 300])
    writer.add_token_scores([0.5, 1.5, 2.5])
    writer.add_token_types([1, 1, 3])
    for name, (kind, numbers) in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40),
        st.tuples(st.sampled_from(TYPES), st.lists(st.integers(1, 3), max_size=2)),
        min_size=1,
        max_size=9,
    ),
    st.sampled_from([32, 64, 4096]),
)
def test_what_the_library_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, table: dict[str, Any], alignment: int
) -> None:
    """The same names, types, shapes and bytes as the library's own reader has."""
    random = np.random.default_rng(0)
    tensors = {n: (kind, random.normal(size=(*lead, 64)).astype(np.float32)) for n, (kind, lead) in table.items()}
    path = tmp_path_factory.mktemp("round") / "m.gguf"
    written(path, tensors, alignment)

    checkpoint = read_checkpoint(path)

    raw = path.read_bytes()
    read = {t.name: (t.dtype, t.shape, raw[t.offset : t.offset + t.size_bytes]) for t in checkpoint.tensors}
    theirs = gguf.GGUFReader(path).tensors
    assert read == {
        t.name: (t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)), t.data.tobytes()) for t in theirs
    }
    assert read.keys() == tensors.keys()


def test_single_values_are_kept_and_arrays_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    written(path, {"a": (GGMLQuantizationType.F32, np.zeros((1, 64), np.float32))})
    raw = path.read_bytes()

    header = read_header(lambda at, size: raw[at : at + size], "m.gguf", len(raw))

    assert header.metadata == {
        "general.architecture": "qwen3",
        "general.name": "Größe",
        "qwen3.block_count": 36,
        "qwen3.rope.freq_base": 1e6,
        "a.switch": True,
    }


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("padding", [0, 96])
def test_both_versions_and_both_ends_are_read(tmp_path: Path, version: int, padding: int) -> None:
    """Some writers pad the last tensor too, some do not."""
    path = tmp_path / "m.gguf"
    words = array("tokenizer.ggml.tokens", 8, 2, text("a") + text(""))
    pairs = (words,) if padding else ()
    path.write_bytes(file_of((tensor(dims=(8, 4, 1, 1)),), pairs, bytes(128 + padding % 32), version))

    (spec,) = read_checkpoint(path).tensors

    assert (spec.name, spec.dtype, spec.shape, spec.size_bytes) == ("a", "F32", (1, 1, 4, 8), 128)


def test_a_header_takes_no_more_than_it_is(tmp_path: Path) -> None:
    """Of a file of many gigabytes only the beginning is read."""
    path = tmp_path / "m.gguf"
    path.write_bytes(file_of((tensor(dims=(1 << 30, 8)),), data=b""))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + (8 << 32))  # sparse
    asked: list[int] = []

    def fetch(at: int, size: int) -> bytes:
        asked.append(at + size)
        with path.open("rb") as file:
            file.seek(at)
            return file.read(size)

    (spec,) = read_header(fetch, "m.gguf", path.stat().st_size).tensors

    assert spec.size_bytes == 8 << 32
    assert max(asked) <= 1 << 20


def test_a_file_that_shrinks_while_it_is_read_is_refused() -> None:
    raw = file_of(pairs=(array("a", 0, 3 << 20, bytes(3 << 20)),))
    with pytest.raises(BadCheckpoint, match="truncated while its header was read"):
        read_header(lambda at, size: raw[at : at + min(size, (1 << 20) - at)], "m.gguf", len(raw))
