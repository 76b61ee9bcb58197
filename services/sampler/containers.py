"""What a PNG, JPEG or WebP file says before a pixel of it is decoded: its size, orientation, colour profile, frames.

Reads bytes and allocates no more than they are; knows no Pillow. Of PNG and JPEG it leaves only what makes the pixels:
what a decoder is given has one header, no text, no metadata and no animation.
Sources: PNG Third Edition (W3C), ITU-T T.81 (JPEG), RFC 9649 (WebP), Exif 2.32 (TIFF 6.0's directories), ICC.1 annex B.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

PROFILE_LIMIT_BYTES = 4 << 20  # press profiles of CMYK have two or three
SCAN_LIMIT = 100  # progressive encoders make about ten; each costs the decoder a pass over the picture

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
EXIF = b"Exif\0\0"
ICC = b"ICC_PROFILE\0"
ORIENTATION = 0x0112
SOS = 0xDA
SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
TABLES = frozenset({0xC4, 0xCC, 0xDB, 0xDD})
JFIF, ADOBE = 0xE0, 0xEE  # they tell YCbCr from RGB, and YCCK from CMYK
METADATA = frozenset({*range(0xE0, 0xF0), 0xFE})


class UnreadableError(Exception):
    """The bytes are no picture that is served; the text says why, in half a sentence."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A file by its headers."""

    format: str  # "PNG", "JPEG", "WEBP"
    width_px: int  # as stored, before the orientation is applied
    height_px: int
    file: bytes  # for the decoder
    depth: int = 8  # bits of a sample
    frames: int = 1
    orientation: int = 1  # Exif's: 1 to 8, anything else means nothing
    profile: bytes = b""  # ICC profile, empty if there is none or it is too large


def read(data: bytes) -> Encoded:
    """The file's headers. Raises UnreadableError."""
    try:
        if data.startswith(PNG_SIGNATURE):
            return _png(data)
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
    except (struct.error, IndexError) as error:
        raise UnreadableError("is truncated") from error
    raise UnreadableError("is neither PNG nor JPEG nor WebP")


def _png(data: bytes) -> Encoded:
    chunks: dict[bytes, list[bytes]] = {}
    at, kind = len(PNG_SIGNATURE), b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        (crc,) = struct.unpack_from(">I", data, at + 8 + length)
        if crc != zlib.crc32(body, zlib.crc32(kind)):
            raise UnreadableError("is damaged: a checksum does not match")
        chunks.setdefault(kind, []).append(body)
        at += 12 + length
    header = chunks.get(b"IHDR", [b""])[0]
    width, height, depth = struct.unpack_from(">IIB", header)
    pixels = b"".join(chunks.get(b"IDAT", ()))
    kept = [(kind, chunks[kind][0]) for kind in (b"IHDR", b"PLTE", b"tRNS") if kind in chunks]
    return Encoded(
        "PNG",
        width,
        height,
        PNG_SIGNATURE + b"".join(_png_chunk(*chunk) for chunk in (*kept, (b"IDAT", pixels), (b"IEND", b""))),
        depth=depth,
        frames=max(1, len(chunks.get(b"fcTL", ()))),
        orientation=_orientation(chunks.get(b"eXIf", [b""])[0]),
        profile=_inflated_profile(chunks.get(b"iCCP", [b""])[0]),
    )


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body), kind) + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))


def _inflated_profile(chunk: bytes) -> bytes:
    """Of iCCP: a name, a zero, the method, deflated bytes."""
    _, _, rest = chunk.partition(b"\0")
    inflater = zlib.decompressobj()
    try:
        profile = inflater.decompress(rest[1:], PROFILE_LIMIT_BYTES)
    except zlib.error:
        return b""
    return profile if inflater.eof else b""


def _jpeg(data: bytes) -> Encoded:
    kept, profile, exif, size = [data[:2]], [], b"", (0, 0)
    at, marker = 2, 0
    while marker != SOS:
        while data[at : at + 2] == b"\xff\xff":  # fill bytes
            at += 1
        start, marker, (length,) = data[at], data[at + 1], struct.unpack_from(">H", data, at + 2)
        segment = data[at : at + 2 + length]
        body = segment[4:]
        if start != 0xFF or length < 2 or marker not in SOF | TABLES | METADATA | {SOS}:
            raise UnreadableError("is damaged: its header does not go on where it should")
        if marker in SOF:
            if size != (0, 0):
                raise UnreadableError("is damaged: it has two headers")
            height, width = struct.unpack_from(">HH", body, 1)
            size = width, height
        if body.startswith(EXIF):
            exif = exif or body
        if body.startswith(ICC):
            profile.append(body[len(ICC) :])
        if marker not in METADATA - {JFIF, ADOBE}:
            kept.append(segment)
        at += 2 + length
    if data.count(bytes((0xFF, SOS)), at) >= SCAN_LIMIT:
        raise UnreadableError(f"is a JPEG of more than {SCAN_LIMIT} scans")
    kept.append(data[at:])
    return Encoded("JPEG", *size, b"".join(kept), orientation=_orientation(exif), profile=_joined_profile(profile))


def _joined_profile(parts: list[bytes]) -> bytes:
    """Of APP2 segments: each begins with its number, from 1, and how many there are."""
    parts = sorted(parts, key=lambda part: part[:1])
    if len(parts) > 255 or any(part[:2] != bytes((k, len(parts))) for k, part in enumerate(parts, 1)):
        return b""
    profile = b"".join(part[2:] for part in parts)
    return profile if len(profile) <= PROFILE_LIMIT_BYTES else b""


def _webp(data: bytes) -> Encoded:
    chunks: dict[bytes, list[bytes]] = {}
    at, end = 12, 8 + struct.unpack_from("<I", data, 4)[0]
    if end > len(data):
        raise UnreadableError("is truncated")
    while at + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, at)
        chunks.setdefault(kind, []).append(data[at + 8 : at + 8 + length])
        at += 8 + length + length % 2
    profile = chunks.get(b"ICCP", [b""])[0]
    return Encoded(
        "WEBP",
        *_webp_size(data[12:16], data[20:30]),
        data[:end],
        frames=max(1, len(chunks.get(b"ANMF", ()))),
        orientation=_orientation(chunks.get(b"EXIF", [b""])[0]),
        profile=profile if len(profile) <= PROFILE_LIMIT_BYTES else b"",
    )


def _webp_size(kind: bytes, body: bytes) -> tuple[int, int]:
    """Width and height by the first chunk: the canvas, a key frame of VP8, or VP8L's."""
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and body[:1] == b"\x2f":
        (bits,) = struct.unpack_from("<I", body, 1)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    raise UnreadableError("is a WebP whose first chunk is unknown")


def _orientation(exif: bytes) -> int:
    """The orientation in the first directory of Exif data; 1 if there is none or the data is damaged."""
    tiff = exif.removeprefix(EXIF)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, directory)
        for entry in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind, values, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
            if (tag, kind, values) == (ORIENTATION, 3, 1):
                return int(value)
    except struct.error:
        pass
    return 1
