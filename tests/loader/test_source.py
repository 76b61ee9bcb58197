"""Reading a checkpoint file: each range to its places, from the page cache what is there, and no copy left in it."""

import mmap
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from bench.disk import cached_pages
from services.errors import BadCheckpoint, CheckpointChanged
from services.loader.buffers import Buffers
from services.loader.source import SourceFile, Target
from services.params.layout import PAGE
from services.params.specs import CheckpointFile, FileIdentity

SIZE = 3_000_001
RANGES = [(0, 4096), (1, 1), (4095, 2), (12_345, 2_000_003), (SIZE - 5, 5)]


@pytest.fixture
def file(tmp_path: Path) -> CheckpointFile:
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(SIZE))
    return CheckpointFile(path, FileIdentity.of(path.stat()), "0" * 32)


def drop(path: Path) -> None:
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def disk_reads() -> Iterator[list[int]]:
    """Bytes that this process has had read from storage inside the block."""

    def count() -> int:
        return int(Path("/proc/self/io").read_text().partition("\nread_bytes: ")[2].split()[0])

    counted = [-count()]
    yield counted
    counted[0] += count()


def read(source: SourceFile, offset: int, size_bytes: int, cuts: tuple[float, ...] = ()) -> bytes:
    """A range, into places of their own for the parts between `cuts`."""
    ends = [*(int(size_bytes * cut) for cut in cuts), size_bytes]
    parts = [memoryview(bytearray(end - start)) for start, end in zip([0, *ends], ends, strict=False)]
    starts = [0, *ends][:-1]
    staging = memoryview(mmap.mmap(-1, size_bytes + 2 * PAGE))
    source.read(offset, size_bytes, [Target(at, part) for at, part in zip(starts, parts, strict=True)], staging)
    return b"".join(parts)


@pytest.mark.parametrize("is_cached", [True, False])
@pytest.mark.parametrize("is_buffered", [True, False])
def test_every_way_reads_the_same(file: CheckpointFile, is_cached: bool, is_buffered: bool) -> None:
    """Ranges that begin and end anywhere, in one place, in three, and in more than one call takes."""
    want = file.path.read_bytes()
    for offset, size in RANGES:
        for cuts in ((), (0.3, 0.8), tuple(n / 2500 for n in range(1, 2500))):
            drop(file.path)
            if is_cached:
                file.path.read_bytes()
            with SourceFile(file, is_buffered) as source:
                assert read(source, offset, size, cuts) == want[offset : offset + size]


def test_what_the_page_cache_has_is_not_read_again(file: CheckpointFile) -> None:
    drop(file.path)
    with SourceFile(file, False) as source:
        with disk_reads() as from_disk:
            read(source, 12_345, 2_000_003)
        assert from_disk[0] >= 2_000_003
        assert cached_pages(file.path) == 0, "read around the page cache"

        file.path.read_bytes()
        with disk_reads() as from_disk:
            read(source, 12_345, 2_000_003)
        assert from_disk[0] == 0


def test_a_file_that_ends_early_is_a_change(file: CheckpointFile) -> None:
    for is_buffered in (True, False):
        with SourceFile(file, is_buffered) as source, pytest.raises(CheckpointChanged, match="shorter"):
            read(source, SIZE - 10, 2 * PAGE)


def test_files_that_cannot_be_read_are_named(file: CheckpointFile, tmp_path: Path) -> None:
    """And no descriptor is left open."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    os.utime(file.path, (1, 1))
    with pytest.raises(CheckpointChanged, match="changed"), SourceFile(file, False):
        pass
    with pytest.raises(CheckpointChanged, match="removed"), SourceFile(replace(file, path=tmp_path / "x"), True):
        pass
    folder = replace(file, path=tmp_path, identity=FileIdentity.of(tmp_path.stat()))
    with pytest.raises(BadCheckpoint, match="cannot be read"), SourceFile(folder, True) as source:
        read(source, 0, 10)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_buffers_are_used_again_and_given_back_when_no_fill_goes_on() -> None:
    """An idle loader is small."""
    buffers = Buffers()
    with buffers.kept():
        with buffers.one() as one, buffers.one() as other:
            assert one is not other
            known = weakref.ref(other)
        with buffers.kept(), buffers.one() as again:
            assert again in (known(), one)
        del one, other, again
        assert known() is not None
    assert known() is None


def test_a_file_removed_between_its_two_openings_leaves_no_descriptor(
    file: CheckpointFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def opened(path: Path, flags: int, *rest: int) -> int:
        fd = real(path, flags, *rest)
        file.path.unlink(missing_ok=True)
        return fd

    before = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(CheckpointChanged, match="removed"), SourceFile(file, False):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before
