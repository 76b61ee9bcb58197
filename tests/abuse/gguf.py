"""GGUF files that are refused, and the builder of one that is not."""

import struct
from typing import Any

from services.params.gguf_header import MAX_ENTRIES, MAX_HEADER_BYTES, MAX_WORDS
from services.params.specs import MAX_TENSORS

F32, F16, Q8_0, Q4_K = 0, 1, 8, 12
U32, BOOL, TEXT, ARRAY = 4, 7, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def u32(key: str, value: int) -> bytes:
    return pair(key, U32, struct.pack("<I", value))


def array(key: str, kind: int, count: int, items: bytes = b"") -> bytes:
    return pair(key, ARRAY, struct.pack("<IQ", kind, count) + items)


def tensor(name: str | bytes = "a", dims: tuple[int, ...] = (32,), kind: int = F32, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file_of(
    tensors: tuple[bytes, ...] = (tensor(),),
    pairs: tuple[bytes, ...] = (),
    data: bytes = bytes(128),
    version: int = 3,
    alignment: int = 32,
    **counts: Any,
) -> bytes:
    """A file; `tensor_count` and `pair_count` may lie."""
    head = b"GGUF" + struct.pack(
        "<IQQ", version, counts.get("tensor_count", len(tensors)), counts.get("pair_count", len(pairs))
    )
    head += b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


ALIGNED = u32("general.alignment", 64)

FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "magic only": (b"GGUF", "truncated"),
    "half a magic": (b"GG", "not a GGUF file"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "not a GGUF file"),
    "ggml of old": (b"lmgg\x01\0\0\0" + bytes(60), "not a GGUF file"),
    "ggjt of old": (b"tjgg\x03\0\0\0" + bytes(60), "not a GGUF file"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git-lfs"),
    "html": (b"<html>not found</html>", "HTML"),
    "zip pickle": (b"PK\x03\x04" + bytes(60), "pickle"),
    "raw pickle": (b"\x80\x04\x95" + bytes(60), "pickle"),
    "version 1": (file_of(version=1), "version 1"),
    "version 4": (file_of(version=4), "version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 1, 0) + bytes(99), "version 50331648"),
    "no counts": (b"GGUF" + struct.pack("<I", 3), "truncated"),
    "2^63 tensors": (file_of(tensor_count=1 << 63), "tensors: "),
    "a tensor too many": (file_of(tensor_count=MAX_TENSORS + 1), f"{MAX_TENSORS} are the limit"),
    "fewer tensors than it says": (file_of(tensor_count=2, data=b""), "truncated"),
    "2^63 entries": (file_of(pair_count=1 << 63), "metadata entries: "),
    "an entry too many": (file_of(pair_count=MAX_ENTRIES + 1), f"{MAX_ENTRIES} are the limit"),
    "no tensors": (file_of((), data=b""), "no tensors"),
    "key of 2^64 bytes": (file_of(pairs=(struct.pack("<Q", (1 << 64) - 1),)), "bytes of a metadata key"),
    "key past the end": (file_of((), (struct.pack("<Q", 200),), data=b""), "truncated"),
    "key of 257 bytes": (file_of(pairs=(pair("k" * 257, U32, bytes(4)),)), "bytes of a metadata key"),
    "empty key": (file_of(pairs=(u32("", 1),)), "key is empty"),
    "NUL in a key": (file_of(pairs=(u32("a\0b", 1),)), "not printable"),
    "newline in a key": (file_of(pairs=(u32("a\nb", 1),)), "not printable"),
    "key not UTF-8": (file_of(pairs=(pair(b"\xff\xfe", U32, bytes(4)),)), "not UTF-8"),
    "key twice": (file_of(pairs=(u32("a", 1), u32("a", 2))), "stands twice"),
    "key twice, of other kinds": (file_of(pairs=(u32("a", 1), array("a", U32, 0))), "stands twice"),
    "unknown kind": (file_of(pairs=(pair("a", 13, bytes(8)),)), "kind that is not known"),
    "kind of 2^32 - 1": (file_of(pairs=(pair("a", (1 << 32) - 1, bytes(8)),)), "kind that is not known"),
    "bool of 2": (file_of(pairs=(pair("a", BOOL, b"\x02"),)), "neither true nor false"),
    "text of 2^63 bytes": (file_of(pairs=(pair("a", TEXT, struct.pack("<Q", 1 << 63)),)), "bytes of metadata a"),
    "text of a MiB and a byte": (file_of(pairs=(pair("a", TEXT, text("x" * ((1 << 20) + 1))),)), "bytes of metadata a"),
    "text past the end": (file_of((), (pair("a", TEXT, struct.pack("<Q", 999)),), data=b""), "truncated"),
    "text not UTF-8": (file_of(pairs=(pair("a", TEXT, text(b"\xc3\x28")),)), "not UTF-8"),
    "value cut off": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<I", 10) + b"\0", "truncated"),
    "array of 2^63 numbers": (file_of(pairs=(array("a", U32, 1 << 63),)), "items of metadata a"),
    "array of 2^62 numbers": (file_of(pairs=(array("a", U32, 1 << 62),)), "items of metadata a"),
    "array whose bytes wrap": (file_of(pairs=(array("a", 10, (1 << 61) + 1, bytes(8)),)), "items of metadata a"),
    "array past the end": (file_of((), (array("a", U32, 1000),), data=b""), "truncated"),
    "array of arrays": (file_of(pairs=(array("a", ARRAY, 1, struct.pack("<IQ", ARRAY, 1) * 99),)), "array of a kind"),
    "array of an unknown kind": (file_of(pairs=(array("a", 99, 1, bytes(8)),)), "array of a kind"),
    "array of 2^63 words": (file_of(pairs=(array("a", TEXT, 1 << 63),)), "words of metadata a"),
    "a word too many": (file_of(pairs=(array("a", TEXT, MAX_WORDS + 1),)), f"{MAX_WORDS} are the limit"),
    "a word too many in two arrays": (
        file_of(pairs=(array("a", TEXT, 2, text("x") * 2), array("b", TEXT, MAX_WORDS - 1))), "words of metadata b",
    ),
    "as many words as may be, of no bytes there": (file_of((), (array("a", TEXT, MAX_WORDS),), data=b""), "truncated"),
    "word of 2^63 bytes": (file_of(pairs=(array("a", TEXT, 2, struct.pack("<Q", 1 << 63)),)), "truncated"),
    "word of 2^64 - 8 bytes": (file_of(pairs=(array("a", TEXT, 2, struct.pack("<Q", (1 << 64) - 8)),)), "truncated"),
    "last word past the end": (file_of((), (array("a", TEXT, 1, struct.pack("<Q", 1 << 40)),), data=b""), "truncated"),
    "header of more than 32 MiB": (
        file_of(pairs=tuple(array(f"k{n}", 0, 1 << 20, bytes(1 << 20)) for n in range(33))),
        f"larger than {MAX_HEADER_BYTES >> 20} MiB",
    ),
    "alignment 0": (file_of(pairs=(u32("general.alignment", 0),)), "alignment"),
    "alignment 1": (file_of(pairs=(u32("general.alignment", 1),)), "alignment"),
    "alignment 48": (file_of(pairs=(u32("general.alignment", 48),)), "alignment"),
    "alignment 2^31": (file_of(pairs=(u32("general.alignment", 1 << 31),)), "alignment"),
    "alignment is text": (file_of(pairs=(pair("general.alignment", TEXT, text("32")),)), "alignment"),
    "alignment is true": (file_of(pairs=(pair("general.alignment", BOOL, b"\x01"),)), "alignment"),
    "name of 2^63 bytes": (file_of((struct.pack("<Q", 1 << 63),)), "bytes of a tensor name"),
    "name of 257 bytes": (file_of((tensor("n" * 257),)), "bytes of a tensor name"),
    "empty name": (file_of((tensor(""),)), "tensor name is empty"),
    "NUL in a name": (file_of((tensor("a\0b"),)), "printable"),
    "newline in a name": (file_of((tensor("a\nb"),)), "printable"),
    "name not UTF-8": (file_of((tensor(b"\xff"),)), "not UTF-8"),
    "name twice": (file_of((tensor(), tensor(offset=128)), data=bytes(256)), "stands twice"),
    "no dimensions": (file_of((tensor(dims=()),)), "0 dimensions"),
    "five dimensions": (file_of((tensor(dims=(32, 1, 1, 1, 1)),)), "5 dimensions"),
    "2^32 - 1 dimensions": (file_of((text("a") + struct.pack("<I", (1 << 32) - 1),)), "4294967295 dimensions"),
    "dimension 0": (file_of((tensor(dims=(32, 0)),)), "no file can hold"),
    "dimension 2^64 - 1": (file_of((tensor(dims=((1 << 64) - 1,)),)), "no file can hold"),
    "dimensions that wrap to 0": (file_of((tensor(dims=(1 << 32, 1 << 32)),)), "no file can hold"),
    "dimensions that wrap to 32": (file_of((tensor(dims=((1 << 62) + 8, 4)),)), "no file can hold"),
    "exabyte shape": (file_of((tensor(dims=(1 << 20, 1 << 20, 1 << 20)),)), "no file can hold"),
    "type 4, which is no more": (file_of((tensor(kind=4),)), "type that is not known"),
    "type 2^32 - 1": (file_of((tensor(kind=(1 << 32) - 1),)), "type that is not known"),
    "rows of half a block": (file_of((tensor(dims=(16, 2), kind=Q8_0),)), "blocks of 32"),
    "rows of a block and a bit": (file_of((tensor(dims=(300,), kind=Q4_K),)), "blocks of 256"),
    "offset 2^63": (file_of((tensor(offset=1 << 63),)), "hole or overlaps"),
    "offset 2^64 - 32": (file_of((tensor(offset=(1 << 64) - 32),)), "hole or overlaps"),
    "unaligned offset": (file_of((tensor(), tensor("b", offset=129)), data=bytes(257)), "hole or overlaps"),
    "hole at the start": (file_of((tensor(offset=32),), data=bytes(160)), "hole or overlaps"),
    "hole": (file_of((tensor(), tensor("b", offset=160)), data=bytes(288)), "hole or overlaps"),
    "overlap": (file_of((tensor(), tensor("b", offset=96)), data=bytes(224)), "hole or overlaps"),
    "the same bytes twice": (file_of((tensor(), tensor("b"))), "hole or overlaps"),
    "back to front": (file_of((tensor(offset=128), tensor("b")), data=bytes(256)), "hole or overlaps"),
    "packed for another alignment": (
        file_of((tensor(dims=(8,)), tensor("b", offset=32)), (ALIGNED,), bytes(160), alignment=64), "hole or overlaps",
    ),
    "data truncated": (file_of(data=bytes(127)), "truncated"),
    "no data": (file_of(data=b""), "truncated"),
    "data too long": (file_of(data=bytes(129)), "longer than its header"),
    "a packed type's data truncated": (file_of((tensor(kind=Q8_0),), data=bytes(33)), "truncated"),
}  # fmt: skip
