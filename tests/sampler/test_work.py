"""Memory for work: what was seen is remembered, what was not is scaled."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.sampler.requests import Task
from services.sampler.work import MARGIN, SCRATCH_BYTES, Kind, Need, WorkMemory

MIB = 1 << 20
kinds = st.builds(Kind, st.sampled_from("ab"), st.integers(1, 64).map(lambda n: n * 16), st.just(512))
needs = st.integers(1, 4000).flatmap(lambda peak: st.builds(Need, st.just(peak * MIB), st.integers(0, peak * MIB)))


@given(st.lists(st.tuples(kinds, needs), min_size=1), st.lists(kinds, max_size=8))
def test_room_holds_whoever_runs_beside_all_that_wait(seen: list[tuple[Kind, Need]], riding: list[Kind]) -> None:
    """Whichever picture is at its peak, what the others keep fits beside it."""
    work = WorkMemory(64 * MIB)
    for kind, need in seen:
        work.learn(kind, need)
    room = work.room_bytes(riding)
    for running in range(len(riding)):
        parked = sum(work.need(k).parked_bytes for n, k in enumerate(riding) if n != running)
        assert work.need(riding[running]).peak_bytes + parked <= room
    for kind, need in seen:
        assert work.need(kind).peak_bytes >= need.peak_bytes


def test_a_size_not_seen_yet_is_scaled_by_area() -> None:
    """Twice the area needs twice as much beside the libraries' scratch; a smaller one is not trusted to need less."""
    work = WorkMemory(64 * MIB)
    assert work.need(Kind("a", 512, 512)).peak_bytes == 64 * MIB
    work.learn(Kind("a", 512, 512), Need(SCRATCH_BYTES + 100 * MIB, 10 * MIB))

    assert work.need(Kind("a", 1024, 512)) == Need(
        round((SCRATCH_BYTES + 200 * MIB) * MARGIN), round(10 * MIB * MARGIN)
    )
    assert work.need(Kind("a", 256, 256)).peak_bytes == round((SCRATCH_BYTES + 100 * MIB) * MARGIN)
    assert work.need(Kind("b", 1024, 512)).peak_bytes == 64 * MIB


def test_a_thumbnail_does_not_speak_against_pictures() -> None:
    """Nearly all that it takes is the libraries' scratch memory, which a picture takes too, but once."""
    work = WorkMemory(64 * MIB)
    work.learn(Kind("a", 64, 64), Need(37 * MIB, 1 * MIB))

    assert not work.never_fits(Kind("a", 1024, 1024), 500 * MIB)


def test_a_model_is_attached_with_room_for_a_picture() -> None:
    """The guess, which a restart would ask for again, or what a picture of one of the kinds is known to need."""
    work = WorkMemory(64 * MIB)
    work.learn(Kind("a", 512, 512), Need(100 * MIB, 10 * MIB))
    work.learn(Kind("b", 512, 512), Need(10 * MIB, 10 * MIB))

    assert work.least_bytes([Kind("b", 512, 512)]) == 64 * MIB
    assert work.least_bytes([Kind("b", 512, 512), Kind("a", 512, 512)]) == round(100 * MIB * MARGIN)


def test_tiles_are_a_kind_of_their_own() -> None:
    """A tiled picture says nothing of one that is not, nor the other way round; tiles of a size not seen are tried."""
    work = WorkMemory(64 * MIB)
    plain, tiled = Kind("a", 512, 512), Kind("a", 512, 512, tiled=True)
    work.learn(plain, Need(1000 * MIB, 10 * MIB))
    assert work.need(tiled).peak_bytes == 64 * MIB
    work.learn(tiled, Need(100 * MIB, 10 * MIB))

    assert work.need(plain).peak_bytes == round(1000 * MIB * MARGIN)
    assert work.need(tiled).peak_bytes == round(100 * MIB * MARGIN)
    assert work.never_fits(Kind("a", 1024, 1024), 300 * MIB)
    assert not work.never_fits(Kind("a", 1024, 1024, tiled=True), 300 * MIB)
    assert work.never_fits(tiled, 99 * MIB)


def test_tasks_and_what_they_refer_to_are_kinds_of_their_own() -> None:
    """An edit says nothing of a picture from text; another one is scaled by what it draws and what it looks at."""
    work = WorkMemory(64 * MIB)
    edit = Kind("a", 1024, 1024, task=Task.EDIT, reference_px=((1024, 1024),))
    work.learn(edit, Need(SCRATCH_BYTES + 200 * MIB, 10 * MIB))
    larger = Kind("a", 1024, 1024, task=Task.EDIT, reference_px=((4000, 3000), (1024, 1024), (2048, 2048)))

    assert work.need(Kind("a", 1024, 1024)).peak_bytes == 64 * MIB
    assert work.need(larger).peak_bytes == round((SCRATCH_BYTES + 400 * MIB) * MARGIN)  # three of a megapixel each


@given(st.integers(1, 5000))
def test_the_largest_that_fits_does(room_mib: int) -> None:
    """The size named to who asked for too much is one that fits, of about the same shape."""
    work = WorkMemory(64 * MIB)
    work.learn(Kind("a", 512, 512), Need(1000 * MIB, 10 * MIB))
    width, height = work.largest(Kind("a", 2048, 1024), room_mib * MIB, 16)

    assert width % 16 == 0
    assert height % 16 == 0
    assert work.need(Kind("a", 2048, 1024)).peak_bytes * (width * height) / (2048 * 1024) <= room_mib * MIB
