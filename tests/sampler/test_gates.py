"""Gates: which modules get one, and how a gate's bytes are packed into a slot."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from services.sampler.gates import Absent, BoundParam, is_host_lookup, lay_out, merge_ranges, split

ranges = st.lists(st.tuples(st.integers(0, 50_000), st.integers(1, 5_000)), min_size=1, max_size=30)


def bound(start: int, size: int) -> BoundParam:
    view = torch.empty(size, dtype=torch.uint8)
    return BoundParam(view, start, size, view)


@given(ranges)
def test_every_param_has_its_bytes_in_one_copy(spans: list[tuple[int, int]]) -> None:
    """Places and copies agree: following them finds each param's own arena bytes in the slot."""
    params = tuple(bound(start, size) for start, size in spans)
    copies, places, size_bytes = lay_out(params)
    slot = [-1] * size_bytes
    for copy in copies:
        slot[copy.at : copy.at + copy.size_bytes] = range(copy.offset, copy.offset + copy.size_bytes)

    for param, at in zip(params, places, strict=True):
        assert slot[at : at + param.size_bytes] == list(range(param.offset, param.offset + param.size_bytes))
        assert at % 512 == param.offset % 512  # kernels see the arena's alignment


@given(ranges)
def test_copies_never_overlap(spans: list[tuple[int, int]]) -> None:
    """No copy writes over another, in the slot or by copying arena bytes twice."""
    copies, _, size_bytes = lay_out(tuple(bound(start, size) for start, size in spans))

    for one, other in itertools.pairwise(sorted(copies, key=lambda c: c.at)):
        assert one.at + one.size_bytes <= other.at
        assert one.offset + one.size_bytes <= other.offset or other.offset + other.size_bytes <= one.offset
    assert all(c.at + c.size_bytes <= size_bytes for c in copies)


def test_neighbours_are_one_copy() -> None:
    """Tensors that lie side by side in the arena, padding between them, travel together."""
    assert merge_ranges([(0, 100), (512, 1024), (5000, 6000)]) == [(0, 1024), (5000, 6000)]
    assert lay_out(()) == ((), (), 0)


class Net(nn.Module):
    """A block list, a table, a param of its own, and a module inside a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(4))
        self.table = nn.Embedding(100, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3))
        self.heads = nn.ModuleDict({"a": nn.Linear(16, 4)})
        self.register_buffer("scale", torch.ones(2))


def test_split_gates_blocks_and_leaves_the_rest() -> None:
    """Containers are always split, blocks below the limit are not, own tensors stay out of all gates."""
    net = Net()
    names = [name for name, _ in split(net, 2000)[0]]
    left = split(net, 2000)[1]

    assert names == ["table", "blocks.0", "blocks.1", "blocks.2", "heads.a"]
    assert [id(t) for t in left] == [id(net.token), id(net.scale)]


def test_split_keeps_a_small_module_whole() -> None:
    """Below the limit one gate serves the component, and nothing is left."""
    net = Net()

    assert [name for name, _ in split(net, 1 << 20)[0]] == [""]
    assert split(net, 1 << 20)[1] == []


def test_split_goes_down_to_leaves() -> None:
    """A limit below a block's size gates the layers inside; modules without params get no gate."""
    assert [n for n, _ in split(Net(), 100)[0]] == ["table", "blocks.0.0", "blocks.1.0", "blocks.2.0", "heads.a"]


def test_what_is_packed_counts_as_it_travels() -> None:
    """A block stays whole that is small enough on the bus, unless its scratch would be far larger than a slot."""
    net = Net()
    packed = {id(p): p.numel() for p in net.parameters()}

    names = [[name for name, _ in split(net, limit, packed)[0]] for limit in (300, 550, 600)]
    assert names[0] == ["table", "blocks.0.0", "blocks.1.0", "blocks.2.0", "heads.a"]
    assert names[1] == ["table", "blocks.0", "blocks.1", "blocks.2", "heads.a"]
    assert [name for name, _ in split(net, 600)[0]] == names[0]
    assert [name for name, _ in split(net, 1 << 14, packed)[0]] == [""]


def test_a_shared_module_gets_one_gate() -> None:
    """A module that is registered twice is gated once."""
    net = Net()
    net.blocks.append(net.blocks[0])

    assert [n for n, _ in split(net, 2000)[0]].count("blocks.0") == 1
    assert "blocks.3" not in [n for n, _ in split(net, 2000)[0]]


def test_absent_params_look_right_and_read_as_nan() -> None:
    """Shape and dtype may be asked for outside a gate; a value is NaN."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        gone = Absent(torch.device("cpu")).like(torch.zeros(3, 5, dtype=dtype))
        assert gone.shape == (3, 5)
        assert gone.dtype == dtype
        assert gone.isnan().all()


def test_only_large_plain_tables_are_looked_up_on_the_host() -> None:
    """A subclass may do more than look up, and a small table is not worth it."""

    class Scaled(nn.Embedding):
        pass

    with torch.device("meta"):
        assert is_host_lookup(nn.Embedding(200_000, 512))
        assert not is_host_lookup(Scaled(200_000, 512))
        assert not is_host_lookup(nn.Embedding(100, 16))
