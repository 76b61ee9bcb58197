"""The ring of slots, on a CPU: whatever the order of gates, an open gate's params are its own."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from services.errors import DeviceMemoryFull
from services.params.layout import Extent
from services.sampler.budget import UNLIMITED_BYTES, Budget, budget_bytes
from services.sampler.gates import BoundParam, Gate
from services.sampler.ring import Ring, pieces_of

GATES, WEIGHTS = 8, 256


class Memory:
    """An arena that is all there: extents of 4 KiB, numbers that tell the gates apart."""

    def __init__(self) -> None:
        numbers = torch.arange(GATES * WEIGHTS, dtype=torch.float32)
        self.data = memoryview(bytearray(numbers.numpy().tobytes()))
        self.extents = tuple(Extent(start, 4096) for start in range(0, len(self.data), 4096))

    def is_ready(self, extent: int) -> bool:
        return True


@pytest.fixture
def gates() -> list[Gate]:
    memory: Any = Memory()
    flat = torch.frombuffer(memory.data, dtype=torch.float32)
    found = []
    for n in range(GATES):
        view = flat[n * WEIGHTS : (n + 1) * WEIGHTS].view(16, 16)
        param = nn.Parameter(view, requires_grad=False)
        bound = BoundParam(param, n * WEIGHTS * 4, WEIGHTS * 4, view)
        found.append(Gate("c", str(n), nn.Identity(), memory, (bound,)))
    return found


def holds_its_own(gate: Gate) -> bool:
    number = int(gate.name)
    return bool(torch.equal(gate.params[0].tensor.flatten(), torch.arange(number * 256, number * 256 + 256.0)))


def ring(gates: list[Gate], budget_bytes: int = 1 << 20, **options: Any) -> Ring:
    made = Ring(torch.device("cpu"), Budget(budget_bytes), **options)
    made.attach(gates)
    return made


def pass_all(made: Ring, gates: list[Gate]) -> None:
    """A sweep: each gate opens on its own bytes, and closes."""
    for gate in gates:
        made.enter(gate)
        assert holds_its_own(gate)
        made.leave(gate)


def following(gates: list[Gate], gate: Gate) -> Iterator[Gate]:
    at = int(gate.name)
    yield from [*gates[at + 1 :], *gates[: at + 1]]


@pytest.mark.parametrize("poison", [True, False])
@pytest.mark.parametrize("slot_count", [2, 3, 4])
def test_any_order_of_gates(gates: list[Gate], slot_count: int, poison: bool) -> None:
    """Sweeps, jumps and repeats: an open gate holds its own bytes after its prefetches, a left one holds NaN."""
    made = ring(gates, keep_residents=False, slot_counts=[slot_count], poison=poison)
    rng = random.Random(slot_count)
    for step in range(300):
        gate = gates[step % GATES] if step < 40 else rng.choice(gates)
        made.enter(gate)
        made.prefetch(gate, following(gates, gate))
        assert holds_its_own(gate)
        made.leave(gate)
        assert gate.params[0].tensor.isnan().all()


def test_a_hit_is_not_overwritten_by_its_own_prefetch(gates: list[Gate]) -> None:
    """A gate that is still in its slot when it is opened again keeps it while others are brought."""
    made = ring(gates, keep_residents=False)
    made.enter(gates[0])
    made.prefetch(gates[0], iter(gates[1:3]))
    made.leave(gates[0])
    made.enter(gates[0])
    made.prefetch(gates[0], iter(gates[3:5]))

    assert holds_its_own(gates[0])


def test_a_sweep_copies_every_byte_once(gates: list[Gate]) -> None:
    """Prefetched gates are found, not copied again; residents are copied once for all sweeps."""
    streaming = ring(gates, keep_residents=False)
    resident = ring(gates)
    for made in (streaming, resident):
        for _ in range(5):
            for gate in gates:
                made.enter(gate)
                made.prefetch(gate, following(gates, gate))
                made.leave(gate)

    sweep = GATES * WEIGHTS * 4
    assert 5 * sweep <= streaming.streamed_bytes <= 5 * sweep + 2 * WEIGHTS * 4  # two ahead of the last
    assert resident.streamed_bytes == sweep
    assert [resident.streamed_bytes_of(g) for g in gates] == [0] * GATES


def test_the_budget_decides_who_stays(gates: list[Gate]) -> None:
    """What three slots leave of the budget is for residents; a small one has two slots; too small is refused."""
    made = ring(gates, budget_bytes=6 * WEIGHTS * 4)
    assert sum(made.resident_bytes_of(g) for g in gates) == 3 * WEIGHTS * 4
    assert ring(gates, budget_bytes=2 * WEIGHTS * 4).held_bytes == 2 * WEIGHTS * 4
    with pytest.raises(DeviceMemoryFull, match=r"too small: --max-vram 0\.01 is the least that works"):
        ring(gates, budget_bytes=2 * WEIGHTS * 4 - 1)


def test_work_takes_the_place_of_residents(gates: list[Gate]) -> None:
    """What is reserved for work is not held; more than the slots leave is refused with everything as it was."""
    made = ring(gates, budget_bytes=6 * WEIGHTS * 4)
    pass_all(made, gates)
    assert made.held_bytes == 6 * WEIGHTS * 4
    made.reserve(2 * WEIGHTS * 4)
    assert made.held_bytes <= 4 * WEIGHTS * 4
    with pytest.raises(DeviceMemoryFull):
        made.reserve(5 * WEIGHTS * 4)
    made.reserve(0)
    pass_all(made, gates)

    assert made.held_bytes == 6 * WEIGHTS * 4


def test_a_budget_that_shrinks(gates: list[Gate]) -> None:
    """What the process takes elsewhere comes off the residents when the budget is looked at."""
    budget = Budget(6 * WEIGHTS * 4)
    made = Ring(torch.device("cpu"), budget, slot_counts=(3, 2), budget_now=lambda: budget)
    made.attach(gates)
    assert sum(made.resident_bytes_of(g) for g in gates) == 3 * WEIGHTS * 4
    budget = replace(budget, outside_bytes=WEIGHTS * 4)
    made.review_budget()
    assert sum(made.resident_bytes_of(g) for g in gates) == 2 * WEIGHTS * 4


def test_the_budget_that_a_refusal_names_works(gates: list[Gate]) -> None:
    """With what CUDA takes, graphs, a pinned gate, and a picture's work, for which a smaller budget has no room."""
    gates[0].pinned = True
    work_bytes = 2 << 30

    def attach(budget: Budget) -> None:
        made = Ring(torch.device("cpu"), budget)
        made.attach(gates, work_bytes)
        assert made.reserve_bytes == work_bytes <= made.work_limit_bytes

    small = Budget(work_bytes, 600 << 20, has_graphs=True)
    with pytest.raises(DeviceMemoryFull) as refused:
        attach(small)
    named = str(refused.value).split("--max-vram ")[1].split()[0]
    attach(replace(small, total_bytes=budget_bytes(float(named), UNLIMITED_BYTES)))
    least = small.least_bytes(work_bytes + 3 * WEIGHTS * 4)
    attach(replace(small, total_bytes=least))
    with pytest.raises(DeviceMemoryFull):
        attach(replace(small, total_bytes=least - 1))


def test_work_makes_way_for_a_model(gates: list[Gate]) -> None:
    """Room that pictures had once is given back as far as a new model needs it, not beyond what is asked for work."""
    made = ring(gates[:1], budget_bytes=6 * WEIGHTS * 4)
    made.reserve(5 * WEIGHTS * 4)
    made.attach(gates[1:3], 4 * WEIGHTS * 4)
    assert made.reserve_bytes == 4 * WEIGHTS * 4
    with pytest.raises(DeviceMemoryFull):
        made.attach(gates[3:], 5 * WEIGHTS * 4)
    made.attach(gates[3:], WEIGHTS * 4)

    assert made.reserve_bytes == 4 * WEIGHTS * 4


def test_slots_that_could_not_be_had_are_asked_for_again(gates: list[Gate], monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that was short in spite of the plan costs the request that asked; the next one finds slots."""
    made = ring(gates, budget_bytes=6 * WEIGHTS * 4)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as short:
        short.setattr("services.sampler.slots.new_slot", full)
        with pytest.raises(torch.OutOfMemoryError):
            made.reserve(4 * WEIGHTS * 4)
        with pytest.raises(torch.OutOfMemoryError):
            made.enter(gates[0])
    made.enter(gates[0])
    assert holds_its_own(gates[0])
    made.leave(gates[0])
    made.reserve(4 * WEIGHTS * 4)

    assert made.held_bytes == 2 * WEIGHTS * 4


def test_residents_make_way(gates: list[Gate]) -> None:
    """Where memory is short all residents go, and every gate is streamed from then on."""
    made = ring(gates)
    pass_all(made, gates)
    assert made.make_way()
    assert not made.make_way()
    pass_all(made, gates)

    assert made.held_bytes == 3 * WEIGHTS * 4


def test_a_run_of_small_gates_leaves_the_large_slots_alone(gates: list[Gate]) -> None:
    """Before three small gates the next large one is on its way as well."""
    memory = gates[0].arena
    whole = torch.frombuffer(memory.data, dtype=torch.float32)
    large = [
        Gate("c", f"large {n}", nn.Identity(), memory, (BoundParam(nn.Parameter(v, requires_grad=False), 0, 8192, v),))
        for n, v in enumerate([whole.view(64, 32), whole.view(32, 64)])
    ]
    small = [
        Gate("c", f"{n}", nn.Identity(), memory, (BoundParam(nn.Parameter(v, requires_grad=False), n * 512, 512, v),))
        for n, v in enumerate(whole[: 3 * 128].split(128))
    ]
    made = ring([large[0], *small, large[1]], keep_residents=False)
    made.enter(large[0])
    made.prefetch(large[0], iter([*small, large[1]]))

    assert made.streamed_bytes == 2 * 8192 + 3 * 512


def test_a_host_table_is_read_where_it_lies(gates: list[Gate]) -> None:
    """Inside its gate the param is the arena's view itself, outside it is absent; nothing is copied for it."""
    table = gates[0]
    table.host = True
    made = ring(gates, keep_residents=False)
    assert table.params[0].tensor.isnan().all()
    made.enter(table)
    assert table.params[0].tensor.data_ptr() == table.params[0].view.data_ptr()
    made.prefetch(table, following(gates, table))
    assert holds_its_own(table)
    made.leave(table)

    assert table.params[0].tensor.isnan().all()
    assert made.streamed_bytes == 3 * WEIGHTS * 4  # the three ahead: a table needs no slot


def test_detached_gates_leave_nothing(gates: list[Gate]) -> None:
    """Half of the gates go; the others still find their bytes."""
    made = ring(gates, keep_residents=False)
    made.detach(gates[:4])
    for gate in gates[4:]:
        made.enter(gate)
        assert holds_its_own(gate)
        made.leave(gate)


def test_copies_end_where_chunks_end(gates: list[Gate]) -> None:
    """A gate over two chunks is two copies that together are the gate."""
    assert list(pieces_of(gates[0], 1000)) == [(0, 1000, 0), (1000, 24, 1000)]
    assert list(pieces_of(gates[3], 4096)) == [(3072, 1024, 0)]
    assert list(pieces_of(gates[4], 4100)) == [(4096, 4, 0), (4100, 1020, 4)]


def test_a_model_that_does_not_fit_leaves_the_others_alone(gates: list[Gate]) -> None:
    """An attach that is refused changes nothing: what was attached still works, and so does the next attach."""
    made = ring(gates[:2], budget_bytes=3 * WEIGHTS * 4, keep_residents=False)
    memory = gates[0].arena
    large = torch.frombuffer(memory.data, dtype=torch.float32)
    param = nn.Parameter(large, requires_grad=False)
    bound = BoundParam(param, 0, large.numel() * 4, large)
    with pytest.raises(DeviceMemoryFull):
        made.attach([Gate("c", "large", nn.Identity(), memory, (bound,))])
    made.attach(gates[2:4])
    for gate in gates[:4]:
        made.enter(gate)
        assert holds_its_own(gate)
        made.leave(gate)


def test_detached_gates_are_forgotten(gates: list[Gate]) -> None:
    """A slot that held a gate keeps neither it nor views of its memory once its model is gone."""
    made = ring(gates, keep_residents=False)
    made.enter(gates[0])
    made.leave(gates[0])
    gone = weakref.ref(gates[0].params[0].view)
    made.detach([gates[0]])
    del gates[0]
    gc.collect()

    assert gone() is None
