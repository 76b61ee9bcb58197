"""Numbers are packed as ggml's types while an extent is filled: what gguf.quants.quantize makes of them, bit for bit.

The only file of the loader that imports numpy and gguf; it is imported when the first read has something to pack.
Q8_0 has a way of its own here, several times as fast as the package's; the other types go through the package.
Source of the types: https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

# Numbers at a time. Each step on them is a numpy call that lets other threads run while it does and waits for its turn
# when it has: with chunks that fit a second-level cache, sixteen threads spend their time on waiting.
CHUNK_NUMBERS = 1 << 19
# What packing takes at most, beside the numbers and the blocks. BF16, by the package, takes 26 bytes a number, the
# types in blocks less than 14.
SCRATCH_BYTES = 32 * CHUNK_NUMBERS
_BLOCK = 32
_ROWS = 16  # that the package takes at a time
# The float below a half: added before what is behind the point is cut off, it rounds halves away from zero, and
# 0.49999997, for which a half itself would be too much, to zero.
_HALF = np.float32(0.49999997)
_SIGN = np.uint32(1 << 31)
_Q8_0 = np.dtype([("d", "<f2"), ("q", "i1", _BLOCK)])


@dataclass(frozen=True, slots=True)
class _Floats:
    """A float type by its bits: the integer that holds one, and what infinity is without its sign."""

    bits: type[np.unsignedinteger[Any]]
    infinity: int

    @property
    def magnitude(self) -> int:
        return int(np.iinfo(self.bits).max >> 1)


_FLOATS = {
    "BF16": _Floats(np.uint16, 0x7F80),
    "F16": _Floats(np.uint16, 0x7C00),
    "F32": _Floats(np.uint32, 0x7F800000),
}


def pack(raw: memoryview, source: str, target: str, out: memoryview) -> None:
    """Write numbers of the type `source` to `out` as `target`; both are words of the arena's manifest.

    raw: whole blocks of numbers, little-endian, from any byte on; out: as many blocks. Takes SCRATCH_BYTES.
    """
    bits, packed = np.frombuffer(raw, _FLOATS[source].bits), np.frombuffer(out, np.uint8)
    q8 = _Q8(source, min(len(bits), CHUNK_NUMBERS)) if target == "Q8_0" else None
    with np.errstate(all="ignore"):  # infinities, and what becomes of them, are the checkpoint's affair
        for start in range(0, len(bits), CHUNK_NUMBERS):
            end = min(start + CHUNK_NUMBERS, len(bits))
            chunk = bits[start:end]
            place = packed[len(packed) * start // len(bits) : len(packed) * end // len(bits)]
            if q8 is None or not q8.pack(chunk, place):
                place[:] = _by_gguf(_numbers(chunk, source), target)


def _by_gguf(numbers: NDArray[np.float32], target: str) -> NDArray[np.uint8]:
    """In rows as long as can be: the package takes a few at a time, and each is a turn to wait for."""
    rows = math.gcd(_ROWS, len(numbers) // _BLOCK) if not len(numbers) % _BLOCK else 1
    packed: NDArray[Any] = gguf.quants.quantize(numbers.reshape(rows, -1), gguf.GGMLQuantizationType[target])
    return packed.reshape(-1).view(np.uint8)


def _numbers(bits: NDArray[Any], source: str, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Float32 of what the bits mean."""
    out = np.empty(len(bits), np.float32) if out is None else out
    if source == "BF16":
        wide = out.view(np.uint32)
        np.copyto(wide, bits)
        np.left_shift(wide, np.uint32(16), out=wide)
    else:
        np.copyto(out, bits.view(np.float16 if source == "F16" else np.float32))
    return out


class _Q8:
    """Packs chunks as Q8_0: a float16 `d` and 32 int8 a block, each number divided by d and rounded.

    Its scratch memory is made once. Maxima of blocks are taken in pairs of neighbours, over the whole chunk: numpy
    reduces short rows one by one.
    """

    def __init__(self, source: str, chunk_numbers: int) -> None:
        self._source = source
        self._floats = _FLOATS[source]
        self._x, self._y = (np.empty(chunk_numbers, np.float32) for _ in range(2))
        self._halves = tuple(np.empty(chunk_numbers // part, self._floats.bits) for part in (1, 2))

    def pack(self, bits: NDArray[Any], out: NDArray[np.uint8]) -> bool:
        """False, with nothing written, for what the package has to decide: infinities, and scales that become so.

        bits: (numbers,), whole blocks; out: 34 bytes a block.
        """
        peaks = self._peaks(bits)
        if peaks.max() >= self._floats.infinity:
            return False
        d = _numbers(peaks, self._source) / np.float32(127)
        inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
        if np.isinf(inverse.max()):
            return False
        blocks = out.view(_Q8_0)
        blocks["d"] = d
        np.copyto(blocks["q"], self._rounded(bits, inverse), casting="unsafe")
        return True

    def _peaks(self, bits: NDArray[Any]) -> NDArray[Any]:
        """The bits of each block's largest magnitude: without their signs, floats are in the order of their bits."""
        read, written = self._halves
        found: NDArray[Any] = np.bitwise_and(bits, self._floats.bits(self._floats.magnitude), out=read[: len(bits)])
        while len(found) * _BLOCK > len(bits):
            found = np.maximum(found[0::2], found[1::2], out=written[: len(found) // 2])
            read, written = written, read
        return found

    def _rounded(self, bits: NDArray[Any], inverse: NDArray[np.float32]) -> NDArray[np.float32]:
        """(blocks, 32) numbers of up to 127 whose integer parts are what is to be stored."""
        x, half = self._x[: len(bits)], self._y[: len(bits)]
        blocks = _numbers(bits, self._source, out=x).reshape(-1, _BLOCK)
        np.multiply(blocks, inverse[:, None], out=blocks)
        np.bitwise_and(x.view(np.uint32), _SIGN, out=half.view(np.uint32))
        np.bitwise_or(half.view(np.uint32), _HALF.view(np.uint32), out=half.view(np.uint32))
        np.add(x, half, out=x)
        return blocks
