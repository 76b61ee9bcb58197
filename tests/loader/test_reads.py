"""The reads of an extent: every byte of every tensor once, in the order of the arena."""

from hypothesis import given
from hypothesis import strategies as st

from services.loader.reads import plan_reads
from services.params.layout import place
from services.params.specs import TensorSpec


@given(
    st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 2)), min_size=1, max_size=25),
    st.sampled_from([512, 4096, 5000, 1 << 20]),
    st.randoms(use_true_random=False),
)
def test_reads_cover_every_tensor_once(sizes: list[tuple[int, int]], chunk: int, random: object) -> None:
    """For any files, any order of tensors in them and any size of read."""
    order = list(range(len(sizes)))
    random.shuffle(order)  # type: ignore[attr-defined]
    ends = {0: 8, 1: 8, 2: 8}
    specs = {}
    for number in order:
        size, file = sizes[number]
        specs[f"t.{number}"] = TensorSpec(f"t.{number}", "U8", (size,), file, ends[file], size)
        ends[file] += size
    layout = place(specs.values(), 16384)

    moved: dict[int, tuple[int, int]] = {}  # byte of the data -> byte of a file
    for extent in range(len(layout.extents)):
        last = -1
        for read in plan_reads(specs, layout, extent, chunk):
            assert read.size_bytes <= chunk
            assert sum(piece.size_bytes for piece in read.pieces) == read.size_bytes
            for piece in read.pieces:
                assert piece.target > last
                last = piece.target + piece.size_bytes - 1
                for at in range(0, piece.size_bytes, 97):
                    moved[piece.target + at] = (read.file, read.offset + piece.at + at)

    for target, (file, offset) in moved.items():
        tensor = next(t for t in layout.tensors if t.offset <= target < t.offset + t.size_bytes)
        spec = specs[tensor.name]
        assert (file, offset) == (spec.file, spec.offset + target - tensor.offset)
    reads = [read for n in range(len(layout.extents)) for read in plan_reads(specs, layout, n, chunk)]
    assert sum(read.size_bytes for read in reads) == sum(size for size, _ in sizes)
