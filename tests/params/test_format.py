"""The arena file against docs/arena-format.md, read by its offsets and not through the code that wrote it."""

import json
import os
import struct
import time
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash

from services.errors import BadArena
from services.params.header import Header, parse
from services.params.layout import place
from services.params.owned_arena import OwnedArena
from services.params.specs import TensorSpec

PAGE = 4096


def test_the_file_is_what_the_document_says() -> None:
    """Every field of the header page, the table, the states, the digests, the manifest and the data."""
    specs = [TensorSpec(f"t.{n}", "BF16", (n, 100), 0, 0, n * 200) for n in (10, 1, 30)]
    header = Header("unet", "ab" * 16, "cd" * 16, "ef" * 16, place(specs, 8192))
    path = Path(f"/dev/shm/headwater-test-{os.getpid()}-{time.monotonic_ns()}.arena")
    arena = OwnedArena.create(path, header)
    arena.reserve()
    try:
        with arena.window(0) as memory:
            memory[512:516] = b"t.10"
        arena.publish(1, b"0123456789abcdef")
        raw = path.read_bytes()
    finally:
        arena.unlink()
        arena.close()

    assert raw[:8] == b"HWARENA\0"
    version, order = struct.unpack_from("<II", raw, 8)
    assert (version, order) == (1, 0x01020304)
    extents, digests, states, manifest, data, size = struct.unpack_from("<6Q", raw, 16)
    assert (extents, digests, states, manifest, data) == (PAGE, 2 * PAGE, 3 * PAGE, 4 * PAGE, 5 * PAGE)
    assert size == len(raw)
    count, zero, manifest_bytes = struct.unpack_from("<IIQ", raw, 64)
    assert (count, zero) == (2, 0)
    assert raw[80:128] == bytes.fromhex("ab" * 16 + "cd" * 16 + "ef" * 16)
    text = raw[manifest : manifest + manifest_bytes]
    table = raw[extents : extents + 16 * count]
    assert raw[128:144] == xxhash.xxh3_128(table + text).digest()
    assert not any(raw[144:4080])
    assert raw[4080:PAGE] == xxhash.xxh3_128(raw[:4080]).digest()
    assert list(struct.iter_unpack("<QQ", table)) == [(0, 4096), (4096, 8192)]
    assert raw[states : states + count] == bytes([0, 3])
    assert raw[digests + 16 : digests + 32] == b"0123456789abcdef"
    assert json.loads(text) == {
        "component": "unet",
        "tensors": [
            ["t.1", "BF16", [1, 100], 0, 200, 0],
            ["t.10", "BF16", [10, 100], 512, 2000, 0],
            ["t.30", "BF16", [30, 100], 4096, 6000, 1],
        ],
    }
    assert raw[data + 512 : data + 516] == b"t.10"


def test_packed_tensors_keep_ggmls_name_of_their_type() -> None:
    """A header says of a packed tensor what the GGUF file says; a word of neither format is refused."""
    specs = [TensorSpec("a", "Q8_0", (2, 64), 0, 0, 136), TensorSpec("b", "Q4_K", (1, 256), 0, 136, 144)]
    header = Header("transformer", "ab" * 16, "cd" * 16, "ef" * 16, place(specs, 8192))

    assert parse(header.pack()[0])[0] == header

    odd = replace(header.layout, tensors=(replace(header.layout.tensors[0], dtype="Q9_9"),))
    with pytest.raises(BadArena, match="manifest"):
        parse(replace(header, layout=odd).pack()[0])
