"""Arenas: attach, lease, reserve, adopt, and what is refused."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.errors import BadArena, HostMemoryFull, LoaderGone
from services.params import header as header_module
from services.params.arena import AttachedArena, ExtentState, attach, discard
from services.params.header import Header
from services.params.layout import PAGE, place
from services.params.owned_arena import OwnedArena
from services.params.specs import TensorSpec

GENERATION = "ab" * 16


def make_header(count: int = 5, size: int = 3000, extent_bytes: int = 8192) -> Header:
    specs = [TensorSpec(f"t.{n}", "U8", (size,), 0, 0, size) for n in range(count)]
    return Header("transformer", GENERATION, "cd" * 16, "ef" * 16, place(specs, extent_bytes))


@pytest.fixture
def owned(memory: Path) -> Iterator[OwnedArena]:
    arena = OwnedArena.create(memory / "t.arena", make_header())
    arena.reserve()
    yield arena
    arena.close()


def fill(arena: OwnedArena, extent: int) -> bytes:
    place_ = arena.header.layout.extents[extent]
    data = bytes([extent + 1]) * place_.size_bytes
    with arena.window(extent) as memory:
        memory[:] = data
    arena.publish(extent, bytes(16))
    return data


def test_a_reader_sees_what_the_owner_published(owned: OwnedArena) -> None:
    """Extents become READY one by one, and their bytes are there."""
    with attach(owned.path, GENERATION) as arena:
        assert arena.ready_bytes == 0
        assert not arena.is_ready(1)
        data = fill(owned, 1)

        assert arena.is_ready(1)
        assert arena.state(0) is ExtentState.ABSENT
        extent = arena.extents[1]
        assert arena.ready_bytes == extent.size_bytes
        assert arena.data[extent.offset : extent.offset + extent.size_bytes] == data
        assert arena.tensors == owned.header.layout.tensors
        assert arena.size_bytes == owned.header.layout.data_bytes == len(arena.data)


def test_a_reader_cannot_write(owned: OwnedArena) -> None:
    """The mapping is read-only, in Python and for the kernel."""
    with attach(owned.path, GENERATION) as arena:
        assert arena.data.readonly
        maps = Path("/proc/self/maps").read_text().splitlines()
        assert [line.split()[1] for line in maps if owned.path.name in line] == ["r--s"]


def test_weights_stay_out_of_core_dumps(owned: OwnedArena) -> None:
    """Also where pages were mapped anew for page-locking."""

    def flags_at(address: int) -> list[str]:
        found: list[str] = []
        inside = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in line.split()[0]:
                start, end = (int(edge, 16) for edge in line.split()[0].split("-"))
                inside = start <= address < end
            elif inside and line.startswith("VmFlags:"):
                found = line.split()[1:]
        return found

    with attach(owned.path, GENERATION) as arena:
        address = np.frombuffer(arena.data, dtype=np.uint8).ctypes.data
        assert "dd" in flags_at(address)  # "do not include area into core dump"
        with arena.writable(address, 0, PAGE):
            assert "dd" in flags_at(address)
        assert "dd" in flags_at(address)


def test_pages_are_writable_for_the_time_of_a_block(owned: OwnedArena) -> None:
    """They are mapped at the same address, show the same bytes as they are filled, and are read-only again after it."""
    expected = fill(owned, 0)
    with attach(owned.path, GENERATION) as arena:
        address = np.frombuffer(arena.data, dtype=np.uint8).ctypes.data
        size = owned.header.layout.data_bytes
        with arena.writable(address, 0, size):
            assert rights_at(address) == "rw-s"
            later = fill(owned, 1)
        extents = owned.header.layout.extents[:2]
        seen = [bytes(arena.data[e.offset : e.offset + e.size_bytes]) for e in extents]

        assert rights_at(address) == "r--s"
        assert seen == [expected, later]


def rights_at(address: int) -> str:
    """What the kernel lets this process do with the page at an address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights = line.split()[:2]
        start, end = (int(edge, 16) for edge in span.split("-"))
        if start <= address < end:
            return rights
    return "not mapped"


def test_the_data_starts_on_a_page(owned: OwnedArena) -> None:
    """So that extents can be page-locked one by one."""
    np = pytest.importorskip("numpy")
    with attach(owned.path, GENERATION) as arena:
        assert np.frombuffer(arena.data, np.uint8).ctypes.data % PAGE == 0


def test_the_lease_holds_until_close_even_if_views_live(owned: OwnedArena) -> None:
    """A view keeps the memory, not the lease."""
    fill(owned, 0)
    arena = attach(owned.path, GENERATION)
    view = arena.data[:100]
    assert owned.is_leased()
    assert not owned.unlink()

    arena.close()
    arena.close()

    assert not owned.is_leased()
    assert owned.unlink()
    assert bytes(view) == b"\1" * 100


def test_a_tensor_outlives_the_attachment(owned: OwnedArena) -> None:
    """In a process of its own: it would die. The memory goes with the tensor, and not before."""
    fill(owned, 0)
    code = f"""
import torch
from pathlib import Path
from services.params.arena import attach
maps = lambda: {owned.path.name!r} in Path('/proc/self/maps').read_text()
arena = attach(Path({str(owned.path)!r}), {GENERATION!r})
tensor = torch.frombuffer(arena.data, dtype=torch.uint8)
arena.close()
print(maps(), tensor[:100].sum().item())
del tensor
print(maps())
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout.split()) == (0, ["True", "100", "False"]), done.stderr


def test_a_killed_reader_holds_no_lease(owned: OwnedArena) -> None:
    """The kernel drops the lease with the process."""
    attaching = f"a = attach(Path({str(owned.path)!r}), {GENERATION!r})"
    code = f"from services.params.arena import *\n{attaching}\nprint('ok', flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdout
        assert reader.stdout.readline() == b"ok\n"
        assert owned.is_leased()
        reader.kill()
        reader.wait()
        assert not owned.is_leased()


def test_an_unlinked_arena_stays_mapped(owned: OwnedArena) -> None:
    """A sampler goes on when the loader has gone for good."""
    data = fill(owned, 2)
    with attach(owned.path, GENERATION) as arena:
        assert owned.unlink(even_if_leased=True)
        owned.close()

        assert arena.data[arena.extents[2].offset :][: len(data)] == data
        with pytest.raises(LoaderGone):
            attach(owned.path, GENERATION)


def test_a_file_replaced_between_open_and_lock_is_noticed(owned: OwnedArena, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease is on the file that has the name, or there is none."""
    real = fcntl.flock

    def slow(fd: int, operation: int) -> None:
        owned.path.unlink()
        OwnedArena.create(owned.path, make_header()).close()
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", slow)
    with pytest.raises(LoaderGone):
        attach(owned.path, GENERATION)


def test_another_generation_is_refused(owned: OwnedArena) -> None:
    with pytest.raises(BadArena, match="generation"):
        attach(owned.path, "00" * 16)


def test_another_layout_version_names_both_and_the_remedy(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader of one release and a sampler of another."""
    with monkeypatch.context() as newer:
        newer.setattr(header_module, "VERSION", 2)
        arena = OwnedArena.create(memory / "a.arena", make_header())
        arena.reserve()
        arena.close()

    with pytest.raises(BadArena, match=r"layout version 2, .* version 1: run loader and samplers of the same"):
        attach(arena.path, GENERATION)


def test_another_byte_order_is_not_called_a_version(owned: OwnedArena) -> None:
    front = bytearray(owned.header.pack()[0])
    front[8:16] = front[8:12][::-1] + front[12:16][::-1]

    with pytest.raises(BadArena, match="byte order"):
        header_module.parse(bytes(front))


def test_a_missing_arena_is_the_loader_gone(memory: Path) -> None:
    with pytest.raises(LoaderGone) as caught:
        attach(memory / "no.arena", GENERATION)
    assert str(memory) not in str(caught.value)


def test_every_flipped_byte_of_header_and_tables_is_noticed(owned: OwnedArena) -> None:
    """Header page, extent table and manifest are under a digest; states and digests are not, they change."""
    front, regions = owned.header.pack()
    count = len(owned.header.layout.extents)
    spans = [(0, PAGE), (regions.extents, regions.extents + 16 * count)]
    spans.append((regions.manifest, regions.manifest + regions.manifest_bytes))
    for start, end in spans:
        for at in range(start, end, 7):
            damaged = bytearray(front)
            damaged[at] ^= 0x40
            with pytest.raises(BadArena):
                header_module.parse(bytes(damaged))
    assert header_module.parse(front)[0] == owned.header


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.integers(0, PAGE))
def test_noise_is_no_arena(memory: Path, noise: bytes, at: int) -> None:
    """Any other file is refused as BadArena, whatever stands in it."""
    page = bytearray(PAGE * 2)
    page[:8] = header_module.MAGIC
    page[at : at + len(noise)] = noise
    path = memory / "noise.arena"
    path.write_bytes(page)

    with pytest.raises(BadArena):
        attach(path, GENERATION)


def test_a_truncated_arena_is_refused_before_it_is_mapped(owned: OwnedArena) -> None:
    """Reading past its end would be a SIGBUS."""
    os.truncate(owned.path, owned.file_bytes - PAGE)

    with pytest.raises(BadArena, match="long"):
        attach(owned.path, GENERATION)


def test_it_is_an_arena_when_all_memory_is_reserved(memory: Path) -> None:
    """From then on the file has all its blocks: no later write can fail for want of room. Earlier writes stay."""
    arena = OwnedArena.create(memory / "a.arena", make_header(count=50, size=10_000))
    data = fill(arena, 3)
    with pytest.raises(BadArena):
        attach(arena.path, GENERATION)
    arena.reserve()

    assert arena.path.stat().st_blocks * 512 >= arena.file_bytes
    assert arena.path.stat().st_mode & 0o777 == 0o640
    with attach(arena.path, GENERATION) as attached:
        place_ = attached.extents[3]
        assert [n for n in range(len(attached.extents)) if attached.is_ready(n)] == [3]
        assert attached.data[place_.offset : place_.offset + place_.size_bytes] == data
    arena.close()


def test_what_does_not_fit_leaves_nothing_behind(memory: Path) -> None:
    """HostMemoryFull with the numbers, and no file."""
    huge = make_header(count=1, size=1 << 50)

    with pytest.raises(HostMemoryFull, match=r"needed, .* MiB free"):
        OwnedArena.create(memory / "a.arena", huge)
    assert not list(memory.iterdir())


def test_adoption_keeps_ready_extents_only(owned: OwnedArena) -> None:
    """READY waits to be verified under the same generation, what was being filled starts over."""
    fill(owned, 0)
    owned.mark(1, ExtentState.FILLING)
    owned.close()

    adopted = OwnedArena.open(owned.path)
    adopted.adopt()

    assert adopted.header == owned.header
    assert adopted.states()[:3] == [ExtentState.VERIFYING, ExtentState.ABSENT, ExtentState.ABSENT]
    adopted.confirm(0)
    assert adopted.states()[0] is ExtentState.READY
    adopted.close()


def test_a_sparse_copy_is_not_adopted(owned: OwnedArena, memory: Path) -> None:
    """A file that is not backed by memory could still be a SIGBUS."""
    front, regions = owned.header.pack()
    path = memory / "sparse.arena"
    path.write_bytes(front)
    os.truncate(path, regions.file_bytes)

    with pytest.raises(BadArena, match="backed"):
        OwnedArena.open(path)


def test_discard_spares_what_is_leased(owned: OwnedArena) -> None:
    """Old arenas go when nobody maps them, damaged ones too."""
    with attach(owned.path, GENERATION):
        assert not discard(owned.path)
    owned.path.write_bytes(b"junk")
    assert discard(owned.path)
    assert not owned.path.exists()
    assert discard(owned.path)


def test_attaching_copies_nothing(owned: OwnedArena) -> None:
    """One descriptor, one mapping, given back."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    arenas: list[AttachedArena] = [attach(owned.path, GENERATION) for _ in range(20)]
    for arena in arenas:
        arena.close()

    assert len(list(Path("/proc/self/fd").iterdir())) == before
