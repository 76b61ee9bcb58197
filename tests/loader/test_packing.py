"""Numbers packed as they are read are what the gguf package makes of them, bit for bit."""

from __future__ import annotations

import tracemalloc
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from services.loader import packing
from services.loader.transcode import TYPES

# Quiet and signalling ones, with and without a sign: not made by arithmetic.
NANS = np.array([0x7FC00000, 0x7F810000, 0xFFC10000], np.uint32).view(np.float32)


def halves() -> NDArray[np.float32]:
    """A block whose scale is 1, so that products end on a half exactly, and just beside it."""
    steps = np.arange(16, dtype=np.float32) + np.float32(0.5)
    beside = np.nextafter(steps, np.float32(0))
    block = np.concatenate([steps, -beside])
    block[0], block[16] = 127, np.nextafter(np.float32(0.5), np.float32(0))
    return block


def ties() -> NDArray[np.float32]:
    """Blocks in which every number lies half-way between two that Q8_0 can hold, as near as it gets."""
    scales = np.arange(1, 65, dtype=np.float32)[:, None, None]
    steps = np.arange(128, dtype=np.float32).reshape(1, 4, 32) - 64
    blocks = (steps + np.float32(0.5)) * scales
    blocks[..., :1] = 127 * scales
    return blocks.reshape(-1, 32)


def edges() -> NDArray[np.float32]:
    """Blocks of 32 that a packer may get wrong."""
    random = np.random.default_rng(3)
    base = random.standard_normal((24, 32)).astype(np.float32)
    base[0] = 0
    base[1] = -0.0
    base[2] = 1e-45  # subnormal
    base[3, ::2], base[3, 1::2] = 1e-39, -0.0
    base[4] *= 1e-38  # scales around the smallest normal
    base[5] *= 3e-38
    base[6] *= 1e-36
    base[7, 5] = np.inf
    base[8, 9], base[8, 10] = -np.inf, np.inf
    base[9, :3] = NANS
    base[10] = halves()
    base[11] = -halves()
    base[12] = 65504
    base[13] = 3e38
    base[14] *= 1e30  # the scale is more than a float16 holds
    base[15, 0], base[15, 31] = 4, -4  # two of the largest magnitude
    base[16, 0], base[16, 31] = -4, 4
    base[17] = 1
    base[18, 1:] = 0
    base[19] *= 1e-7  # the scale is subnormal in float16
    base[20] = np.linspace(-1, 1, 32)
    base[21] = np.float32(1) + np.arange(32, dtype=np.float32) * np.float32(2**-23)  # between two bf16
    base[22] = np.arange(32)
    base[23] = -np.arange(32)
    return base


def as_source(numbers: NDArray[np.float32], source: str) -> NDArray[Any]:
    """Numbers as a file of that type has them."""
    if source == "BF16":
        return (numbers.view(np.uint32) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        return numbers.astype(np.float16 if source == "F16" else np.float32)


def as_floats(held: NDArray[Any]) -> NDArray[np.float32]:
    if held.dtype == np.uint16:
        return (held.astype(np.uint32) << 16).view(np.float32)
    return held.astype(np.float32)


def packed(held: NDArray[Any], source: str, target: str) -> bytes:
    block, size = gguf.GGML_QUANT_SIZES[Kind[target]]
    out = bytearray(held.size // block * size)
    packing.pack(memoryview(held.tobytes()), source, target, memoryview(out))
    return bytes(out)


def expected(held: NDArray[Any], target: str) -> bytes:
    with np.errstate(all="ignore"):
        return bytes(gguf.quants.quantize(as_floats(held).reshape(-1, 32), Kind[target]).tobytes())


@pytest.mark.parametrize("source", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("target", [type_.upper() for type_ in TYPES])
def test_blocks_equal_the_packages(source: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random ones of all magnitudes, and one by one those that are special, alone and in a row with others."""
    monkeypatch.setattr(packing, "CHUNK_NUMBERS", 32 * 1000)
    random = np.random.default_rng(7)
    scales = np.float32(10) ** random.integers(-12, 6, (20_000, 1)).astype(np.float32)
    spread = random.standard_normal((20_000, 32)).astype(np.float32) * scales
    bits = random.integers(0, 1 << 32, (100, 32), np.uint32).view(np.float32)  # any at all
    for numbers in (spread, np.round(spread * 8) / 8, edges(), np.concatenate([spread, edges()]), ties(), bits):
        held = as_source(np.ascontiguousarray(numbers, np.float32), source)
        assert packed(held, source, target) == expected(held, target)
    for row in edges():
        held = as_source(row, source)
        assert packed(held, source, target) == expected(held, target), row


def test_numbers_may_begin_at_any_byte_and_end_anywhere_in_a_chunk() -> None:
    """A tensor's place in its file is not ours to choose."""
    held = as_source(np.random.default_rng(1).standard_normal(32 * 77).astype(np.float32), "BF16")
    raw, out = memoryview(b"\x00" + held.tobytes())[1:], bytearray(34 * 77)
    packing.pack(raw, "BF16", "Q8_0", memoryview(out))
    assert bytes(out) == expected(held, "Q8_0")


def test_floats_of_any_count_are_converted() -> None:
    """A bias has as many as it has."""
    held = np.array([1.5, -0.0, 1e-40, 70000, 3.1415927], np.float32)
    assert packed(held, "F32", "F32") == held.tobytes()
    for target in ("F16", "BF16"):
        with np.errstate(over="ignore"):
            assert packed(held, "F32", target) == gguf.quants.quantize(held, Kind[target]).tobytes()


@pytest.mark.parametrize("target", [type_.upper() for type_ in TYPES])
def test_memory_beside_is_bounded(target: str) -> None:
    """A read of 8 MiB takes no more than is stated."""
    held = as_source(np.random.default_rng(1).standard_normal(4 << 20).astype(np.float32), "BF16")
    block, size = gguf.GGML_QUANT_SIZES[Kind[target]]
    raw, out = memoryview(held).cast("B"), memoryview(bytearray(held.size // block * size))
    tracemalloc.start()
    packing.pack(raw, "BF16", target, out)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes <= packing.SCRATCH_BYTES, peak_bytes
