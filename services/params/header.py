"""The bytes that stand before an arena's data (docs/arena-format.md). Pure: bytes in, values out.

    header page | extent table | digests | states | manifest | data

Every part starts on a page. Digests and states change while an arena is filled; the rest never does.
"""

import json
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import xxhash

from services.errors import BadArena
from services.params.gguf_header import PACKINGS
from services.params.layout import ALIGNMENT, PAGE, Extent, Layout, PlacedTensor, round_up
from services.params.safetensors_header import ITEM_BYTES, MAX_HEADER_BYTES
from services.params.specs import MAX_TENSORS

MAGIC = b"HWARENA\0"
VERSION = 1
BYTE_ORDER = 0x01020304
DIGEST_BYTES = 16
MAX_MANIFEST_BYTES = 2 * MAX_HEADER_BYTES
DTYPES = ITEM_BYTES.keys() | {packing.name for packing in PACKINGS.values()}

_FIXED = struct.Struct("<8sIIQQQQQQIIQ16s16s16s16s")
_EXTENT = struct.Struct("<QQ")
_SEAL_OFFSET = PAGE - DIGEST_BYTES


@dataclass(frozen=True, slots=True)
class Regions:
    """Where the parts of an arena file start, from the start of the file."""

    extents: int
    digests: int
    states: int
    manifest: int
    manifest_bytes: int
    data: int
    file_bytes: int

    @classmethod
    def plan(cls, extent_count: int, manifest_bytes: int, data_bytes: int) -> "Regions":
        sizes = (extent_count * _EXTENT.size, extent_count * DIGEST_BYTES, extent_count, manifest_bytes)
        starts = [PAGE]
        for size in sizes:
            starts.append(starts[-1] + round_up(size, PAGE))
        return cls(starts[0], starts[1], starts[2], starts[3], manifest_bytes, starts[4], starts[4] + data_bytes)


@dataclass(frozen=True, slots=True)
class Header:
    """What an arena says of itself. Generation, boot id and identity are 32 hex digits each."""

    component: str
    generation: str
    boot_id: str
    identity: str
    layout: Layout

    @property
    def file_bytes(self) -> int:
        return self.pack()[1].file_bytes

    def pack(self) -> tuple[bytes, Regions]:
        """The first bytes of the file, up to the data, with all extents ABSENT."""
        manifest = _pack_manifest(self)
        extents = b"".join(_EXTENT.pack(extent.offset, extent.size_bytes) for extent in self.layout.extents)
        regions = Regions.plan(len(self.layout.extents), len(manifest), self.layout.data_bytes)
        fixed = _FIXED.pack(
            MAGIC, VERSION, BYTE_ORDER,
            regions.extents, regions.digests, regions.states, regions.manifest, regions.data, regions.file_bytes,
            len(self.layout.extents), 0, regions.manifest_bytes,
            bytes.fromhex(self.generation), bytes.fromhex(self.boot_id), bytes.fromhex(self.identity),
            xxhash.xxh3_128_digest(extents + manifest),
        )  # fmt: skip
        page = fixed.ljust(_SEAL_OFFSET, b"\0")
        out = bytearray(regions.data)
        out[:PAGE] = page + xxhash.xxh3_128_digest(page)
        out[regions.extents : regions.extents + len(extents)] = extents
        out[regions.manifest : regions.manifest + len(manifest)] = manifest
        return bytes(out), regions


def parse_page(page: bytes) -> tuple[Regions, int, bytes]:
    """Regions, number of extents, and the packed ids behind them, of a header page.

    Raises BadArena unless the page is whole, of this version, and its regions are the only ones it can have.
    """
    if len(page) != PAGE or page[:8] != MAGIC:
        raise BadArena("not an arena")
    version, order = struct.unpack_from("<II", page, 8)
    if order != BYTE_ORDER:
        raise BadArena("an arena of a machine with another byte order")
    if version != VERSION:
        raise BadArena(
            f"an arena of layout version {version}, this program reads version {VERSION}:"
            " run loader and samplers of the same release"
        )
    if page[_SEAL_OFFSET:] != xxhash.xxh3_128_digest(page[:_SEAL_OFFSET]):
        raise BadArena("an arena whose header is damaged")
    _, _, _, *offsets, extent_count, _, manifest_bytes, generation, boot_id, identity, digest = _FIXED.unpack_from(page)
    regions = Regions.plan(extent_count, manifest_bytes, offsets[5] - offsets[4])
    planned = [regions.extents, regions.digests, regions.states, regions.manifest, regions.data, regions.file_bytes]
    if extent_count > MAX_TENSORS or manifest_bytes > MAX_MANIFEST_BYTES or planned != offsets or offsets[5] % PAGE:
        raise BadArena("an arena whose header is out of limits")
    return regions, extent_count, generation + boot_id + identity + digest


def parse(front: bytes) -> tuple[Header, Regions]:
    """The header of an arena from its bytes up to the data; raises BadArena."""
    regions, count, ids = parse_page(front[:PAGE])
    extents = front[regions.extents : regions.extents + count * _EXTENT.size]
    manifest = front[regions.manifest : regions.manifest + regions.manifest_bytes]
    if xxhash.xxh3_128_digest(extents + manifest) != ids[48:]:
        raise BadArena("an arena whose tables are damaged")
    component, tensors = _parse_manifest(manifest)
    layout = Layout(
        tensors,
        tuple(Extent(offset, size) for offset, size in _EXTENT.iter_unpack(extents)),
        regions.file_bytes - regions.data,
    )
    check_layout(layout)
    return Header(component, ids[:16].hex(), ids[16:32].hex(), ids[32:48].hex(), layout), regions


def check_layout(layout: Layout) -> None:
    """Extents tile the data and tensors lie apart, aligned, inside their extent; else BadArena."""
    end = 0
    for extent in layout.extents:
        if extent.offset != end or extent.size_bytes <= 0 or extent.size_bytes % PAGE:
            raise BadArena("an arena whose extents do not tile its data")
        end += extent.size_bytes
    if end != layout.data_bytes:
        raise BadArena("an arena whose extents do not tile its data")
    for tensor in layout.tensors:
        if tensor.offset % ALIGNMENT or not 0 <= tensor.extent < len(layout.extents) or tensor.size_bytes < 0:
            raise BadArena(f"an arena that misplaces tensor {tensor.name}")
        extent = layout.extents[tensor.extent]
        if not extent.offset <= tensor.offset <= extent.offset + extent.size_bytes - tensor.size_bytes:
            raise BadArena(f"an arena that misplaces tensor {tensor.name}")
    for one, other in pairwise(sorted(layout.tensors, key=lambda tensor: (tensor.offset, tensor.size_bytes))):
        if one.offset + one.size_bytes > other.offset:
            raise BadArena(f"an arena whose tensors {one.name} and {other.name} overlap")


def _pack_manifest(header: Header) -> bytes:
    rows = [[t.name, t.dtype, list(t.shape), t.offset, t.size_bytes, t.extent] for t in header.layout.tensors]
    manifest = {"component": header.component, "tensors": rows}
    return json.dumps(manifest, ensure_ascii=False, separators=(",", ":")).encode()


def _parse_manifest(raw: bytes) -> tuple[str, tuple[PlacedTensor, ...]]:
    try:
        manifest = json.loads(raw)
        return str(manifest["component"]), tuple(_parse_row(row) for row in manifest["tensors"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadArena("an arena whose manifest is not readable") from error


def _parse_row(row: list[Any]) -> PlacedTensor:
    name, dtype, shape, offset, size_bytes, extent = row
    if dtype not in DTYPES or not all(type(item) is int for item in (*shape, offset, size_bytes, extent)):
        raise ValueError(name)
    return PlacedTensor(name, dtype, tuple(shape), offset, size_bytes, extent)
