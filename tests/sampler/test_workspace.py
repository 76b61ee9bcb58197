"""Room for pictures' work: who waits for whom, and who is told that there will never be enough."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

import pytest
from torch import nn

from services.errors import Cancelled, DeviceMemoryFull
from services.sampler.engine import Engine
from services.sampler.gates import Gate
from services.sampler.riders import Rider
from services.sampler.transfer import ArenaViews
from services.sampler.work import Kind, Need, WorkMemory
from services.sampler.workspace import Workspace
from tests.sampler.inprocess import under_baton

SMALL, LARGE, HUGE = Kind("m", 512, 512), Kind("m", 1024, 512), Kind("m", 4096, 4096)
GATES = 5


class Device(ArenaViews):
    """Room for 110 bytes of work, and what was asked of it."""

    work_limit_bytes = 110

    def __init__(self) -> None:
        self.reserved: list[int] = []

    def streamed_bytes_of(self, gate: Gate) -> int:
        return 0 if gate.host else 1000  # riders share sweeps

    def reserve(self, work_bytes: int) -> None:
        self.reserved.append(work_bytes)


class Studio:
    """An engine, a workspace, and pictures that pass a few gates."""

    def __init__(self) -> None:
        self.device = Device()
        self.engine = Engine(self.device)
        memory = WorkMemory(10, scratch_bytes=0)
        memory.learn(SMALL, Need(38, 19))  # 5 % are added: 40 and 20
        memory.learn(LARGE, Need(80, 40))  # 84 and 42
        memory.learn(Kind("m", 512, 512, tiled=True), Need(38, 19))
        self.workspace = Workspace(self.engine, memory)
        arena: Any = object()
        self.gates = [Gate("c", str(n), nn.Identity(), arena, ()) for n in range(GATES)]
        self.at_work: list[Kind] = []
        self.most: list[list[Kind]] = []
        self.order: list[Kind] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def draw(self, kind: Kind, can_tile: bool = False) -> tuple[Rider, Future[None]]:
        ended: Future[None] = Future()

        def work(rider: Rider) -> None:
            with self.workspace.room(kind, 16, can_tile):
                self.order.append(kind)
                self.at_work.append(kind)
                self.most.append(list(self.at_work))
                try:
                    for gate in self.gates:
                        self.go_on.wait(20)
                        self.engine.arrive(gate)
                finally:
                    self.at_work.remove(kind)

        rider = Rider(work, lambda rider: ended.set_result(None))
        self.engine.ride(rider)
        return rider, ended


@pytest.fixture
def studio() -> Studio:
    return Studio()


def test_pictures_that_fit_work_together(studio: Studio) -> None:
    """Two small ones need 60 of 110 bytes: the room reserved is what both need, and each passes its gates."""
    studio.go_on.clear()
    rides = [studio.draw(SMALL) for _ in range(2)]
    studio.go_on.set()
    for rider, ended in rides:
        ended.result(20)
        assert rider.error is None

    assert max(studio.device.reserved) == 60


def test_a_picture_waits_for_room(studio: Studio) -> None:
    """Two large ones would need 126 bytes: one after the other, and both are drawn."""
    rides = [studio.draw(LARGE) for _ in range(4)]
    for rider, ended in rides:
        ended.result(20)
        assert rider.error is None

    assert studio.most == [[LARGE]] * 4
    assert max(studio.device.reserved) == 84


def test_who_waits_is_not_overtaken(studio: Studio) -> None:
    """A small picture that would fit beside the one at work does not pass a large one that came before it."""
    studio.go_on.clear()
    first, second = studio.draw(LARGE), None
    while not studio.at_work:
        pass
    second, third = studio.draw(LARGE), studio.draw(SMALL)
    studio.go_on.set()
    for _, ended in (first, second, third):
        ended.result(20)

    assert studio.order == [LARGE, LARGE, SMALL]


def test_cancelled_while_it_waits(studio: Studio) -> None:
    """A picture that is given up while it waits for room makes way for those behind it."""
    studio.go_on.clear()
    first = studio.draw(LARGE)
    while not studio.at_work:
        pass
    second, third = studio.draw(LARGE), studio.draw(SMALL)
    studio.engine.cancel(second[0])
    studio.go_on.set()
    for _, ended in (first, second, third):
        ended.result(20)

    assert isinstance(second[0].error, Cancelled)
    assert studio.order == [LARGE, SMALL]


def test_a_new_model_leaves_room_for_a_picture_of_each_and_for_those_at_work(studio: Studio) -> None:
    """10 bytes are the guess; a large picture is known to need 84; two small ones at work need 60."""

    def at_work() -> int:
        with studio.workspace.room(SMALL, 16), studio.workspace.room(SMALL, 16):
            return studio.workspace.least_bytes([])

    assert studio.workspace.least_bytes([Kind("new", 16, 16)]) == 10
    assert studio.workspace.least_bytes([Kind("new", 16, 16), LARGE]) == 84
    assert under_baton(studio.engine, at_work) == 60


def test_what_will_never_fit_is_told_the_size_that_does(studio: Studio) -> None:
    """The message names a smaller size of the same shape; nobody waits."""
    rider, ended = studio.draw(HUGE)
    ended.result(20)

    assert isinstance(rider.error, DeviceMemoryFull)
    assert "4096x4096 needs" in str(rider.error)
    assert "the largest of this shape that fits is 816x816; or raise --max-vram" in str(rider.error)


def test_tiles_are_a_remedy(studio: Studio) -> None:
    """Where the model has tiles the message names them, and who asks for them is let in, with all the room there is."""
    plain, plain_ended = studio.draw(HUGE, can_tile=True)
    tiled, tiled_ended = studio.draw(Kind("m", 4096, 4096, tiled=True), can_tile=True)
    plain_ended.result(20)
    tiled_ended.result(20)

    assert isinstance(plain.error, DeviceMemoryFull)
    assert "with tiled_decode it may need less" in str(plain.error)
    assert tiled.error is None
