"""Unpacked weights are what the gguf package makes of the same bytes: the same bits of float32, then rounded once."""

from __future__ import annotations

import math

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.params.gguf_header import PACKINGS
from services.sampler.packed import BY_NAME, UNPACKERS, unpack
from services.sampler.packed.runs import Packed, Run
from tests.sampler.packings import SCALES, assert_same, check, kind_of, random_raw, reference, set_scales, wide_shape

# What the package can pack.
WRITTEN = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]
# Zeros, the least and the largest subnormal, one, the largest, infinities, NaN.
ODD_SCALES = [0x0000, 0x8000, 0x0001, 0x83FF, 0x3C00, 0x7BFF, 0x7C00, 0xFC00, 0x7E00]
# The last dimension counts blocks.
SHAPES = [(1,), (1, 1), (7, 3), (2, 3, 2), (300, 1)]


def test_everything_that_the_package_unpacks_is_unpacked() -> None:
    """Q8_1, Q8_K, Q1_0, the integers and F64 are those that neither knows."""
    theirs = set()
    for packing in PACKINGS.values():
        try:
            gguf.quants.dequantize(np.zeros((1, packing.block_bytes), np.uint8), kind_of(packing.name))
            theirs.add(packing.name)
        except NotImplementedError:
            pass
    assert set(UNPACKERS) == theirs


@pytest.mark.parametrize("packing", UNPACKERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_random_blocks(packing: str, shape: tuple[int, ...]) -> None:
    raw = random_raw(packing, math.prod(shape))
    theirs = reference(torch.from_numpy(raw).reshape(-1), packing, wide_shape(packing, shape))
    if packing not in ("F32", "BF16", "MXFP4"):
        assert theirs.isfinite().all()
    check(raw, packing, wide_shape(packing, shape))


@pytest.mark.parametrize("packing", UNPACKERS)
def test_any_bytes(packing: str) -> None:
    """Scales of any size, infinities and NaN among them."""
    raw = np.random.default_rng(1).integers(0, 256, (2000, BY_NAME[packing].block_bytes), np.uint8)
    check(raw, packing, wide_shape(packing, (4, 500)))


@pytest.mark.parametrize("packing", SCALES)
def test_odd_scales(packing: str) -> None:
    """Each with each, where there is a minimum too."""
    pairs = np.array([(scale, minimum) for scale in ODD_SCALES for minimum in ODD_SCALES], np.uint16)
    raw = random_raw(packing, len(pairs))
    set_scales(raw, packing, pairs)
    check(raw, packing, wide_shape(packing, (9, 9)))


def test_scales_of_one_byte() -> None:
    """Each of the 256, with each nibble."""
    nibbles = np.tile(np.arange(16, dtype=np.uint8) * 17, (256, 1))
    scales = np.arange(256, dtype=np.uint8)[:, None]
    check(np.hstack([scales, nibbles]), "MXFP4", (256, 32))
    check(np.hstack([np.tile(scales, (1, 4)), nibbles, nibbles]), "NVFP4", (256, 64))


@pytest.mark.parametrize("packing", WRITTEN)
def test_written_weights(packing: str) -> None:
    """Of normal weights, by the package's own packer: the same as its unpacker, and much like the weights."""
    weights = np.random.default_rng(2).normal(scale=0.02, size=(24, 512)).astype(np.float32)
    with np.errstate(all="ignore"):
        raw = gguf.quants.quantize(weights, kind_of(packing))
    check(raw.view(np.uint8), packing, weights.shape)
    ours = unpack(torch.from_numpy(raw.view(np.uint8)), packing, weights.shape)
    assert torch.corrcoef(torch.stack([ours.float().flatten(), torch.from_numpy(weights).flatten()]))[0, 1] > (
        0.5 if packing.startswith("TQ") else 0.98
    )


@pytest.mark.parametrize("packing", UNPACKERS)
@pytest.mark.parametrize("slice_blocks", [0.1, 1, 4, 5])
def test_slices(packing: str, slice_blocks: float) -> None:
    """Smaller than a block, of one, and those that end within a row."""
    check(random_raw(packing, 21), packing, wide_shape(packing, (7, 3)),
          slice_bytes=int(slice_blocks * BY_NAME[packing].block * 4))  # fmt: skip


@pytest.mark.parametrize("packing", UNPACKERS)
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_bytes_may_begin_anywhere(packing: str, count: int, offset: int) -> None:
    """As a view of a larger tensor, and of memory that torch was given unaligned."""
    raw = random_raw(packing, count)
    shape = wide_shape(packing, (count, 1))
    theirs = reference(torch.from_numpy(raw).reshape(-1), packing, shape)
    arena = np.concatenate([np.zeros(offset, np.uint8), raw.reshape(-1)])
    for view in (torch.from_numpy(arena)[offset:], torch.from_numpy(arena[offset:])):
        assert_same(unpack(view, packing, shape, torch.float32), theirs)


@pytest.mark.parametrize("packing", UNPACKERS)
def test_rows_of_packed_weights_are_rows(packing: str) -> None:
    raw = torch.from_numpy(random_raw(packing, 10))
    columns = 2 * BY_NAME[packing].block
    whole = unpack(raw, packing, (5, columns), torch.float32)
    rows = raw.view(5, -1).split([1, 2, 2])
    parts = [unpack(part, packing, (len(part), columns), torch.float32) for part in rows]
    assert_same(torch.cat(parts), whole)


@pytest.mark.parametrize("packing", UNPACKERS)
def test_single_rows_are_looked_up(packing: str) -> None:
    """In any order and repeated, as an embedding asks for them."""
    raw, columns = torch.from_numpy(random_raw(packing, 10)).flatten(), 2 * BY_NAME[packing].block
    run, ids = Run(packing, 512, raw.numel(), 5 * columns), torch.tensor([3, 0, 3, 4])
    memory = torch.cat([torch.zeros(512, dtype=torch.uint8), raw])
    rows = Packed((run,)).rows(lambda at, size: memory[at : at + size], ids, columns, torch.float32)
    assert_same(rows, unpack(raw, packing, (5, columns), torch.float32)[ids])


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]), st.integers(1, 3))
def test_any_k_quant(data: st.DataObject, packing: str, count: int) -> None:
    size = BY_NAME[packing].block_bytes * count
    raw = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8).copy()
    check(raw, packing, wide_shape(packing, (count, 1)))


@pytest.mark.gpu
@pytest.mark.parametrize("packing", UNPACKERS)
@pytest.mark.parametrize("slice_blocks", [3, 1 << 20])
def test_a_device_gives_the_same_bits(cuda: None, packing: str, slice_blocks: int) -> None:
    """By torch operations and by whatever is faster."""
    raw = random_raw(packing, 700)
    shape = wide_shape(packing, (100, 7))
    theirs = reference(torch.from_numpy(raw).reshape(-1), packing, shape)
    device = torch.from_numpy(raw).cuda()
    slice_bytes = slice_blocks * BY_NAME[packing].block * 4
    assert_same(UNPACKERS[packing](device).float().reshape(shape).cpu(), theirs)
    assert_same(unpack(device, packing, shape, torch.float32, slice_bytes=slice_bytes).cpu(), theirs)
    assert_same(unpack(device, packing, shape, slice_bytes=slice_bytes).cpu(), theirs.to(torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("packing", ["Q8_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("count", [1, 8, 63, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_kernel_gives_the_same_bits(cuda: None, packing: str, count: int, dtype: torch.dtype) -> None:
    """Of any bytes, from any byte on, and writes no further than it should."""
    kernels = pytest.importorskip("services.sampler.packed.kernels")
    raw = torch.randint(256, (count * BY_NAME[packing].block_bytes + 1,), dtype=torch.uint8)
    out = torch.full((count * BY_NAME[packing].block + 64,), 7, dtype=dtype, device="cuda")
    for offset in (0, 1):
        part = raw[offset : len(raw) - 1 + offset]
        kernels.launch(packing, part.cuda() if not offset else raw.cuda()[offset:], out, count)
        shape = (len(out) - 64,)
        assert_same(out[:-64].cpu(), unpack(part.clone(), packing, shape, dtype))
        assert torch.all(out[-64:] == 7)
