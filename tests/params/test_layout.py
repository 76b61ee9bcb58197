"""Layouts: tensors apart and aligned, extents that tile the data."""

from hypothesis import given
from hypothesis import strategies as st

from services.params.header import check_layout
from services.params.layout import ALIGNMENT, PAGE, natural_key, place
from services.params.specs import TensorSpec

SIZES = st.lists(st.one_of(st.integers(0, 5_000), st.sampled_from([0, 511, 512, 513, 4096, 8192, 20_000])), max_size=40)


def specs(sizes: list[int]) -> list[TensorSpec]:
    return [TensorSpec(f"t.{n}", "U8", (size,), 0, 0, size) for n, size in enumerate(sizes)]


@given(SIZES, st.sampled_from([4096, 8192, 16384]))
def test_extents_tile_and_tensors_never_overlap(sizes: list[int], extent_bytes: int) -> None:
    """For any tensors: aligned, inside their extent, apart; extents are whole pages without a gap."""
    layout = place(specs(sizes), extent_bytes)

    check_layout(layout)  # what a reader demands
    end = 0
    for extent in layout.extents:
        assert extent.offset == end
        assert extent.size_bytes > 0
        assert extent.size_bytes % PAGE == 0
        end += extent.size_bytes
    assert layout.data_bytes == end
    end = 0
    for tensor in layout.tensors:
        extent = layout.extents[tensor.extent]
        assert tensor.offset % ALIGNMENT == 0
        assert tensor.offset >= end
        assert extent.offset <= tensor.offset
        assert tensor.offset + tensor.size_bytes <= extent.offset + extent.size_bytes
        end = tensor.offset + tensor.size_bytes


@given(SIZES, st.sampled_from([4096, 16384]))
def test_an_extent_is_full_or_holds_one_larger_tensor(sizes: list[int], extent_bytes: int) -> None:
    """No extent is larger than asked unless one tensor is, and no two neighbours would have fitted into one."""
    layout = place(specs(sizes), extent_bytes)

    members = [[t for t in layout.tensors if t.extent == n] for n in range(len(layout.extents))]
    assert all(members)
    for extent, inside in zip(layout.extents, members, strict=True):
        if extent.size_bytes > extent_bytes:
            assert sum(tensor.size_bytes > 0 for tensor in inside) == 1


@given(SIZES, st.randoms(use_true_random=False))
def test_the_order_of_the_files_does_not_matter(sizes: list[int], random: object) -> None:
    """A layout is a function of the set of tensors."""
    shuffled = specs(sizes)
    random.shuffle(shuffled)  # type: ignore[attr-defined]

    assert place(shuffled, 8192) == place(specs(sizes), 8192)


def test_numbers_in_names_sort_as_numbers() -> None:
    """blocks.2 stands before blocks.10."""
    names = ["blocks.10.w", "blocks.2.w", "a", "blocks.2.b", "x1y", "x01y"]

    assert sorted(names, key=natural_key) == ["a", "blocks.2.b", "blocks.2.w", "blocks.10.w", "x01y", "x1y"]


def test_nothing_is_laid_out_as_nothing() -> None:
    """No tensors, no extents, no bytes."""
    assert place([]).extents == ()
