"""Packed gates in the ring, on a CPU: they stay packed there, and an open one's params are its own numbers."""

from __future__ import annotations

import random
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import nn

from services.params.layout import Extent
from services.sampler.budget import Budget
from services.sampler.gates import BoundParam, Gate
from services.sampler.packed.runs import Packed, Run
from services.sampler.ring import Ring

GATES, ROWS, COLUMNS = 6, 64, 128
PACKED = 64 * 128 // 32 * 34
UNPACKED = 64 * 128 * 2


class Memory:
    """An arena of Q8_0 matrices, one after the other."""

    def __init__(self, matrices: np.ndarray) -> None:
        self.data = memoryview(bytearray(gguf.quants.quantize(matrices, Kind.Q8_0).tobytes()))
        self.extents = (Extent(0, len(self.data)),)

    def is_ready(self, extent: int) -> bool:
        return True


class Model:
    """Gates of one matrix each, and what their numbers are."""

    def __init__(self, seed: int, pinned: frozenset[int] = frozenset(), rows: int = ROWS) -> None:
        matrices = np.random.default_rng(seed).standard_normal((GATES, rows, COLUMNS), dtype=np.float32)
        size_bytes = PACKED * rows // ROWS
        memory: Any = Memory(matrices)
        numbers = gguf.quants.dequantize(gguf.quants.quantize(matrices, Kind.Q8_0), Kind.Q8_0)
        self.numbers = torch.from_numpy(numbers).bfloat16()
        self.gates: list[Gate] = []
        for n in range(GATES):
            view = torch.empty((rows, COLUMNS), dtype=torch.bfloat16)
            packed = Packed((Run("Q8_0", n * size_bytes, size_bytes, view.numel()),))
            bound = BoundParam(nn.Parameter(view), n * size_bytes, size_bytes, view, packed)
            self.gates.append(Gate("c", str(n), nn.Identity(), memory, (bound,), pinned=n in pinned))

    def holds_its_own(self, number: int) -> bool:
        return torch.equal(self.gates[number].params[0].tensor, self.numbers[number])


def ring(model: Model, budget_bytes: int, **options: Any) -> Ring:
    made = Ring(torch.device("cpu"), Budget(budget_bytes), **options)
    made.attach(model.gates)
    return made


def pass_all(made: Ring, model: Model) -> set[int]:
    """A sweep: each gate opens on its own numbers; the addresses where they were."""
    places = set()
    for number, gate in enumerate(model.gates):
        made.enter(gate)
        assert model.holds_its_own(number)
        places.add(gate.params[0].tensor.data_ptr())
        made.leave(gate)
    return places


@pytest.mark.parametrize("poison", [True, False])
@pytest.mark.parametrize("residents", [0, 2, GATES])
def test_any_order_of_gates(residents: int, poison: bool) -> None:
    """Streamed or resident, entered again or after others: what is read is what was packed."""
    model = Model(1, pinned=frozenset({3}))
    made = ring(model, (3 + residents) * PACKED + 2 * UNPACKED + PACKED, poison=poison)
    order = random.Random(0)
    for _ in range(60):
        number = order.randrange(GATES)
        for _ in range(order.randrange(1, 3)):
            made.enter(model.gates[number])
            assert model.holds_its_own(number)
            assert torch.equal(made.views(model.gates[number])[0], model.numbers[number])
            made.leave(model.gates[number])
        assert model.holds_its_own(3)  # once it was there it stays
        if number != 3:
            assert not model.holds_its_own(number) or poison
        made.enter(model.gates[3])


def test_residents_stay_packed() -> None:
    """All of them and one scratch fit where both forms of all of them would not."""
    model = Model(1)
    made = ring(model, GATES * PACKED + UNPACKED)
    pass_all(made, model)
    before = made.streamed_bytes
    pass_all(made, model)

    assert made.held_bytes == GATES * PACKED + UNPACKED
    assert made.streamed_bytes == before == GATES * PACKED


def test_the_scratch_changes_with_the_models() -> None:
    """A model that comes or goes leaves the others' numbers as they are; all unpack to one place."""
    small, large = Model(1), Model(2, rows=2 * ROWS)
    made = ring(small, 1 << 20)
    pass_all(made, small)
    held = made.held_bytes
    made.attach(large.gates)
    places = pass_all(made, small) | pass_all(made, large)
    made.detach(large.gates)
    pass_all(made, small)
    held_then = made.held_bytes
    made.detach(small.gates)

    assert len(places) == 1
    assert held_then == held
    assert made.held_bytes == 0


def test_a_scratch_that_could_not_be_had_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whoever opens a packed gate next; slots change with it, and the gate is closed as any other."""
    small, large = Model(1), Model(2, rows=2 * ROWS)
    made = ring(small, 1 << 17, keep_residents=False)
    made.attach(large.gates)

    def full(device: torch.device, size_bytes: int, poison: bool) -> torch.Tensor:
        if size_bytes:
            raise torch.OutOfMemoryError
        return torch.empty(0, dtype=torch.uint8)

    with monkeypatch.context() as short:
        short.setattr("services.sampler.ring.new_memory", full)
        with pytest.raises(torch.OutOfMemoryError):
            made.detach(large.gates)
    made.enter(small.gates[0])
    assert small.holds_its_own(0)
    made.leave(small.gates[0])

    assert not small.holds_its_own(0)
    pass_all(made, small)
