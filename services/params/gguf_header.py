"""GGUF headers of versions 2 and 3, read strictly and without trusting a byte of them.

Source of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. As for ggml's own reader, tensors lie
one behind the other, each padded to the file's alignment. Single values of the metadata are kept, arrays (a tokenizer's
words) are passed over, but for those that are asked for. Knows no model, no arena, no torch.
"""

import math
import struct
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import NamedTuple

from services.errors import BadCheckpoint
from services.params.layout import round_up
from services.params.specs import MAX_NAME_BYTES, MAX_TENSORS, TensorSpec, check_name, what_is

MAX_HEADER_BYTES = 32 << 20
MAX_ENTRIES = 4096
MAX_TEXT_BYTES = 1 << 20
MAX_KEY_BYTES = 256
MAX_DIMS = 4
# Words and merges of the largest tokenizer in use, Qwen's, are 303,323.
MAX_WORDS = 1 << 19
MAX_ALIGNMENT = 1 << 16
FETCH_BYTES = 1 << 20

# Kinds of metadata values.
BOOL, TEXT, ARRAY = 7, 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


class Packing(NamedTuple):
    """How a ggml type holds numbers: in blocks of so many, of so many bytes."""

    name: str
    block: int
    block_bytes: int


# By their number in a file; ggml's enum ggml_type and its block structs (ggml-common.h).
PACKINGS = {
    number: Packing(*packing)
    for number, packing in {
        0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
        16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
        20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
        24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
        29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
        39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
    }.items()
}  # fmt: skip

Value = str | int | float | bool
Fetch = Callable[[int, int], bytes]  # (offset, size): so many bytes of the file, or fewer at its end


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What stands in front of the tensors' bytes."""

    raw: bytes
    metadata: dict[str, Value]
    tensors: list[TensorSpec]
    arrays: dict[str, list[Value]]


class _Cursor:
    """Reads a file from its beginning, as far as its header goes and no further than a header may."""

    def __init__(self, fetch: Fetch, name: str, file_bytes: int) -> None:
        self.raw = bytearray()
        self.at = 0
        self.name = name
        self.file_bytes = file_bytes
        self._fetch = fetch

    def bad(self, what: str) -> BadCheckpoint:
        return BadCheckpoint(f"{self.name}: {what}")

    def reach(self, end: int) -> None:
        """Have the bytes up to `end`."""
        if end <= len(self.raw):
            return
        if end > self.file_bytes:
            raise self.bad(f"truncated inside its header: {self.file_bytes} bytes, at least {end} expected")
        if end > MAX_HEADER_BYTES:
            raise self.bad(f"its header is larger than {MAX_HEADER_BYTES >> 20} MiB")
        wanted = min(max(end, len(self.raw) + FETCH_BYTES), self.file_bytes, MAX_HEADER_BYTES)
        self.raw += self._fetch(len(self.raw), wanted - len(self.raw))
        if end > len(self.raw):
            raise self.bad("truncated while its header was read")

    def number(self, layout: str) -> int | float | bool:
        size = struct.calcsize(layout)
        self.reach(self.at + size)
        value: int | float | bool = struct.unpack_from(layout, self.raw, self.at)[0]
        self.at += size
        return value

    def size(self, what: str, limit: int) -> int:
        value = int(self.number("<Q"))
        if value > limit:
            raise self.bad(f"{what}: {value} where {limit} are the limit")
        return value

    def text(self, what: str, limit: int) -> str:
        size = self.size(f"bytes of {what}", limit)
        self.reach(self.at + size)
        raw = self.raw[self.at : self.at + size]
        self.at += size
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.bad(f"{what} is not UTF-8") from error

    def pass_words(self, count: int) -> None:
        """Go past so many texts."""
        at, have, length = self.at, len(self.raw), struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > have:
                self.reach(at + 8)
                have = len(self.raw)
            at += 8 + length(self.raw, at)[0]
        self.reach(at)
        self.at = at


def read_header(fetch: Fetch, name: str, file_bytes: int, number: int = 0, kept: Set[str] = frozenset()) -> GgufHeader:
    """The header of the file `name` of so many bytes; `number` is what the tensors carry as `file`.

    kept: keys of the arrays that are wanted too.

    Raises BadCheckpoint, and what `fetch` raises. Takes memory for the header and no more, whatever a file claims.
    """
    cursor = _Cursor(fetch, name, file_bytes)
    head = fetch(0, 64)
    if head[:4] != b"GGUF":
        raise cursor.bad(what_is(head, "GGUF file") if head else "empty")
    cursor.reach(4)
    cursor.at = 4
    version = cursor.number("<I")
    if version not in (2, 3):
        raise cursor.bad(f"GGUF of version {version}; 2 and 3 are read, both little-endian")
    tensor_count = cursor.size("tensors", MAX_TENSORS)
    metadata, arrays = _metadata(cursor, cursor.size("metadata entries", MAX_ENTRIES), kept)
    claims = [_claim(cursor) for _ in range(tensor_count)]
    if len({claim.name for claim in claims}) != len(claims):
        raise cursor.bad("a tensor name stands twice in its header")
    tensors = _placed(cursor, claims, _alignment(cursor, metadata), number)
    return GgufHeader(bytes(cursor.raw[: cursor.at]), metadata, tensors, arrays)


def _metadata(cursor: _Cursor, count: int, kept: Set[str]) -> tuple[dict[str, Value], dict[str, list[Value]]]:
    values: dict[str, Value] = {}
    arrays: dict[str, list[Value]] = {}
    keys: set[str] = set()
    words_left = MAX_WORDS
    for _ in range(count):
        key = cursor.text("a metadata key", MAX_KEY_BYTES)
        if not key or not key.isprintable() or key in keys:
            raise cursor.bad("a metadata key is empty, not printable or stands twice")
        keys.add(key)
        kind = cursor.number("<I")
        if kind == ARRAY:
            start = cursor.at
            words_left -= _pass_array(cursor, key, words_left)
            if key in kept:
                arrays[key] = _array(cursor, key, start)
        else:
            values[key] = _value(cursor, key, kind)
    return values, arrays


def _value(cursor: _Cursor, key: str, kind: float) -> Value:
    if kind == TEXT:
        return cursor.text(f"metadata {key}", MAX_TEXT_BYTES)
    if kind not in SCALARS:
        raise cursor.bad(f"metadata {key} is of a kind that is not known here")
    value = cursor.number(SCALARS[int(kind)])
    if kind == BOOL and cursor.raw[cursor.at - 1] > 1:
        raise cursor.bad(f"metadata {key} is neither true nor false")
    return value


def _pass_array(cursor: _Cursor, key: str, word_limit: int) -> int:
    """Go past an array; how many words it had."""
    kind = cursor.number("<I")
    if kind == TEXT:
        count = cursor.size(f"words of metadata {key}", word_limit)
        cursor.pass_words(count)
        return count
    if kind not in SCALARS:
        raise cursor.bad(f"metadata {key} is an array of a kind that is not known here")
    item_bytes = struct.calcsize(SCALARS[int(kind)])
    size = item_bytes * cursor.size(f"items of metadata {key}", MAX_HEADER_BYTES // item_bytes)
    cursor.reach(cursor.at + size)
    cursor.at += size
    return 0


def _array(cursor: _Cursor, key: str, start: int) -> list[Value]:
    """The items of an array that was passed, and so is within its limits; `start` is where its kind stands."""
    end, cursor.at = cursor.at, start
    kind, count = int(cursor.number("<I")), int(cursor.number("<Q"))
    if count > MAX_WORDS:
        raise cursor.bad(f"items of metadata {key}: {count} where {MAX_WORDS} are the limit")
    if kind == TEXT:
        items: list[Value] = [cursor.text(f"a word of metadata {key}", MAX_TEXT_BYTES) for _ in range(count)]
    else:
        items = list(struct.unpack_from(f"<{count}{SCALARS[kind][1]}", cursor.raw, cursor.at))
        cursor.at = end
    return items


def _alignment(cursor: _Cursor, metadata: dict[str, Value]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.bad(f"its alignment is no power of two from 8 to {MAX_ALIGNMENT}")
    return alignment


class _Claim(NamedTuple):
    """A tensor as the header has it: `offset` counts from the first byte behind the header, padded."""

    name: str
    packing: Packing
    shape: tuple[int, ...]
    offset: int

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) // self.packing.block * self.packing.block_bytes


def _claim(cursor: _Cursor) -> _Claim:
    name = cursor.text("a tensor name", MAX_NAME_BYTES)
    check_name(cursor.name, name)
    dim_count = int(cursor.number("<I"))
    if not 1 <= dim_count <= MAX_DIMS:
        raise cursor.bad(f"tensor {name} has {dim_count} dimensions; 1 to {MAX_DIMS} are read")
    dims = [int(cursor.number("<Q")) for _ in range(dim_count)]
    packing = PACKINGS.get(int(cursor.number("<I")))
    offset = int(cursor.number("<Q"))
    if packing is None:
        raise cursor.bad(f"tensor {name} has a type that is not known here")
    if not all(dims) or math.prod(dims) >= 1 << 48:
        raise cursor.bad(f"tensor {name} has a shape that no file can hold")
    if dims[0] % packing.block:
        raise cursor.bad(
            f"tensor {name} has rows of {dims[0]}, no multiple of {packing.name}'s blocks of {packing.block}"
        )
    return _Claim(name, packing, tuple(reversed(dims)), offset)  # ggml writes the fastest dimension first


def _placed(cursor: _Cursor, claims: list[_Claim], alignment: int, number: int) -> list[TensorSpec]:
    """The tensors where they lie in the file: one behind the other, nothing between them but padding."""
    start = round_up(cursor.at, alignment)
    end = padded = 0
    for claim in claims:
        if claim.offset != padded:
            raise cursor.bad(f"tensor {claim.name} leaves a hole or overlaps another")
        end = claim.offset + claim.size_bytes
        padded = round_up(end, alignment)
    if claims and not start + end <= cursor.file_bytes <= start + padded:
        what = "truncated" if cursor.file_bytes < start + end else "longer than its header says"
        raise cursor.bad(f"{what}: {cursor.file_bytes} bytes, {start + end} expected")
    return [TensorSpec(c.name, c.packing.name, c.shape, number, start + c.offset, c.size_bytes) for c in claims]
