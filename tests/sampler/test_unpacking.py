"""fp8 unpacked, where results are written, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from services.errors import UnsupportedModel
from services.sampler.packed import BY_NAME, FP8, UNPACKERS, unpack, unpack_fp8
from services.sampler.packed.runs import Run, Scale
from tests.sampler.packings import assert_same, random_raw, reference, wide_shape


@pytest.mark.parametrize("packing", ["Q8_0", "F16", "BF16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_written_where_it_is_wanted(packing: str, dtype: torch.dtype) -> None:
    raw = torch.from_numpy(random_raw(packing, 6))
    shape = wide_shape(packing, (2, 3))
    out = torch.empty(shape, dtype=dtype)
    assert unpack(raw, packing, shape, dtype, out) is out
    assert_same(out, reference(raw.reshape(-1), packing, shape).to(dtype))


def test_the_bytes_stay_as_they_are() -> None:
    """They are an arena's, which is mapped read-only."""
    for packing in UNPACKERS:
        raw = torch.from_numpy(random_raw(packing, 4))
        before = raw.clone()
        unpack(raw, packing, wide_shape(packing, (4,)), torch.float32).zero_()
        assert torch.equal(raw, before), packing


@pytest.mark.parametrize("kind", FP8)
@pytest.mark.parametrize("scale", [None, torch.tensor(0.0123), torch.tensor([1.7e-3], dtype=torch.bfloat16)])
@pytest.mark.parametrize("offset", [0, 1])
def test_fp8(kind: str, scale: torch.Tensor | None, offset: int) -> None:
    """Every byte; the scale comes before the rounding."""
    raw = torch.arange(offset + 256).to(torch.uint8)[offset:]
    wide = raw.view(FP8[kind]).float()
    theirs = (wide if scale is None else wide * scale.float()).reshape(16, 16)
    for slice_bytes in (1, 100, 1 << 20):
        assert_same(unpack_fp8(raw, kind, (16, 16), scale, torch.float32, slice_bytes=slice_bytes), theirs)
        assert_same(unpack_fp8(raw, kind, (16, 16), scale, slice_bytes=slice_bytes), theirs.to(torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FP8)
@pytest.mark.parametrize("on_device", [False, True])
def test_fp8_on_a_device(cuda: None, kind: str, on_device: bool) -> None:
    """Wherever the scale is."""
    raw, scale = torch.arange(256).to(torch.uint8), torch.tensor(0.0123)
    ours = unpack_fp8(raw.cuda(), kind, (16, 16), scale.cuda() if on_device else scale)
    assert_same(ours.cpu(), unpack_fp8(raw, kind, (16, 16), scale))


@pytest.mark.parametrize("kind", FP8)
def test_fp8_is_what_its_bits_say(kind: str) -> None:
    """From the formats' definitions: OCP 8-bit Floating Point 1.0, E4M3 without infinities."""
    exponent_bits, mantissa_bits = (4, 3) if kind == "F8_E4M3" else (5, 2)
    bias = 2 ** (exponent_bits - 1) - 1
    for byte in range(128):
        exponent, mantissa = byte >> mantissa_bits, byte % 2**mantissa_bits
        subnormal = math.ldexp(mantissa, 1 - bias - mantissa_bits)
        normal = math.ldexp(mantissa + 2**mantissa_bits, exponent - bias - mantissa_bits)
        ours = unpack_fp8(torch.tensor([byte, byte + 128], dtype=torch.uint8), kind, (2,)).tolist()
        if kind == "F8_E5M2" and exponent == 31:
            assert str(ours) == ("[inf, -inf]" if not mantissa else "[nan, nan]")
        elif byte == 127:
            assert str(ours) == "[nan, nan]"
        else:
            assert ours == [normal if exponent else subnormal, -(normal if exponent else subnormal)]


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation made."""

    size_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view and not function._schema.is_mutable:
            self.size_bytes = max(self.size_bytes, result.nbytes)
        return result


@pytest.mark.parametrize("packing", UNPACKERS)
def test_nothing_is_made_that_is_larger_than_a_slice(packing: str) -> None:
    block = BY_NAME[packing].block
    raw = torch.from_numpy(random_raw(packing, 8192 // block))
    out = torch.empty(8192, dtype=torch.bfloat16)
    unpack(raw, packing, (8192,), out=out)  # tables are made at the first use
    with Largest() as largest:
        unpack(raw, packing, (8192,), out=out, slice_bytes=4096)
    assert largest.size_bytes <= 4096


@pytest.mark.parametrize("packing", ["Q8_1", "Q8_K", "I32", "Q9_9", ""])
def test_an_unknown_packing_is_named(packing: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"packed as {packing} "):
        unpack(torch.zeros(40, dtype=torch.uint8), packing, (32,))
    with pytest.raises(UnsupportedModel, match=f"of type {packing} "):
        unpack_fp8(torch.zeros(40, dtype=torch.uint8), packing, (40,))


@pytest.mark.parametrize(
    ("raw", "shape"),
    [
        (torch.zeros(33, dtype=torch.uint8), (32,)),
        (torch.zeros(35, dtype=torch.uint8), (32,)),
        (torch.zeros(34, dtype=torch.int8), (32,)),
        (torch.zeros(68, dtype=torch.uint8)[::2], (32,)),
        (torch.zeros(34, dtype=torch.uint8), (2, 16)),
        (torch.zeros(34, dtype=torch.uint8), ()),
    ],
)
def test_bytes_that_do_not_fit_are_refused(raw: torch.Tensor, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Q8_0"):
        unpack(raw, "Q8_0", shape)


@pytest.mark.parametrize("kind", FP8)
@pytest.mark.parametrize("slice_bytes", [1, 100, 1 << 20])
def test_fp8_with_a_scale_for_each_row(kind: str, slice_bytes: int) -> None:
    """As torch multiplies, also of rows that are looked up."""
    raw = torch.arange(256, dtype=torch.uint8)
    scales = torch.linspace(0.001, 3, 16)
    theirs = raw.view(FP8[kind]).float().view(16, 16) * scales[:, None]
    assert_same(unpack_fp8(raw, kind, (16, 16), scales, torch.float32, slice_bytes=slice_bytes), theirs)
    assert_same(unpack_fp8(raw, kind, (16, 16), scales, slice_bytes=slice_bytes), theirs.bfloat16())

    memory = torch.cat([raw, scales.view(torch.uint8)])
    run, ids = Run(kind, 0, 256, 256, Scale("F32", 256, 16)), torch.tensor([3, 0, 15])
    assert_same(run.rows(lambda at, size: memory[at : at + size], ids, 16, torch.float32), theirs[ids])


@pytest.mark.parametrize("size", [15, 17])
def test_fp8_bytes_that_do_not_fit_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="16 contiguous bytes are expected"):
        unpack_fp8(torch.zeros(size, dtype=torch.uint8), "F8_E4M3", (4, 4))


def test_more_than_one_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="a scale of 3 numbers"):
        unpack_fp8(torch.zeros(16, dtype=torch.uint8), "F8_E4M3", (4, 4), torch.ones(3, 1))


@pytest.mark.parametrize(
    "out", [torch.empty(33), torch.empty(32, dtype=torch.float16), torch.empty(64)[::2], torch.empty(1, 32)]
)
def test_a_target_that_does_not_fit_is_refused(out: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected"):
        unpack(torch.zeros(34, dtype=torch.uint8), "Q8_0", (32,), torch.float32, out)


def test_nothing_is_unpacked_to_nothing() -> None:
    assert unpack(torch.zeros(0, dtype=torch.uint8), "Q4_K", (0, 256)).shape == (0, 256)
    assert unpack(torch.zeros(4, dtype=torch.uint8), "F32", ()).shape == ()
