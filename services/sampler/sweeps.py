"""Who rides next: which component is swept, whom a sweep carries, and at which gate it goes on.

A sweep brings a component's gates one after the other, and the riders that it carries compute at each. While their
compute takes less time than the bus, one more of them costs nothing; `choose` says whom it takes on beyond that.
Who is not carried waits for a later sweep, in the order of *due* times: when a rider would be done if it had had the
device to itself since it was seated, and had the same estimate. So what is nearly done goes first, and whoever is
seated later than a rider's own remaining work never goes before it.

Sweeps take turns by lanes: each component that is streamed is a lane, and all that are resident are one lane together,
whose turn is one pass of one rider. So no component waits for more than one turn of each other lane. Costs at a gate do
not depend on how many riders or gates there are; sorting is done once a sweep.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heappop, heappush

from services.sampler.estimates import StepCosts
from services.sampler.gates import Gate
from services.sampler.riders import Rider
from services.sampler.tracks import Track


def choose(costs_s: Sequence[float], bus_s: float, load_s: float = 0.0, carried_count: int = 0) -> list[int]:
    """Indices of the riders that a sweep takes on, of those that wait in this order. Pure; seconds.

    costs_s: compute of each for one pass. bus_s: what the sweep keeps the bus busy. load_s, carried_count: compute and
    number of those that it carries already; if there are none, the first is taken on in any case.

    While the bus has time to spare the next one is taken on, also if it does not fit wholly: two sweeps of their own
    would take both of them longer. Beyond that the rest is left for later if it can fill a sweep of its own, so that
    who is nearly done ends sooner and no bus time is lost; else it is taken on too. With nothing to bring (0 s) it is
    one at a time.
    """
    chosen: list[int] = []
    rest_s = sum(costs_s)
    for index, cost_s in enumerate(costs_s):
        anybody = carried_count > 0 or bool(chosen)
        if anybody and load_s >= bus_s and rest_s >= bus_s:
            break
        chosen.append(index)
        load_s += cost_s
        rest_s -= cost_s
    return chosen


class Sweep:
    """One pass over a component's gates: whom it carries, and where they stand."""

    def __init__(self, track: Track, bus_s: float) -> None:
        self.track = track
        self.bus_s = bus_s
        self.at = -1  # place of the gate that it brings now
        self.load_s = 0.0
        self.carried_count = 0
        self._standing: dict[int, deque[Rider]] = {}
        self._places: list[int] = []  # heap; places where nobody stands any more are dropped when they come up

    def carry(self, rider: Rider, gate: Gate, cost_s: float) -> None:
        rider.sweep = self
        self.carried_count += 1
        self.load_s += cost_s
        self.stand(rider, self.track.place[gate])

    def stand(self, rider: Rider, place: int) -> None:
        if place in self._standing:
            self._standing[place].append(rider)
        else:
            self._standing[place] = deque((rider,))
            heappush(self._places, place)

    def next_place(self) -> int | None:
        """The least place where somebody stands; None when the sweep is over."""
        while self._places and self._places[0] not in self._standing:
            heappop(self._places)
        return self._places[0] if self._places else None

    def at_place(self, place: int) -> Sequence[Rider]:
        return self._standing.get(place, ())

    def is_last_pass(self) -> bool:
        """Whether everybody who stands here makes the last step: the bus is wanted elsewhere then."""
        return all(rider.steps_left() == 1 for riders in self._standing.values() for rider in riders)

    def pop(self) -> Rider:
        """The first of those at the gate that it brings goes on."""
        riders = self._standing[self.at]
        if len(riders) == 1:
            del self._standing[self.at]
        return riders.popleft()

    def drop(self, rider: Rider, place: int) -> None:
        """Let a rider go that stands at `place`. Raises ValueError if it does not."""
        riders = self._standing.get(place, deque())
        riders.remove(rider)
        if not riders:
            del self._standing[place]


class Sweeps:
    """All riders that stand at gates, and the sweep under way. Used by the holder of the baton only."""

    def __init__(self, bus_s: Callable[[Gate], float]) -> None:
        self._bus_s_of_gate = bus_s
        self._steps = StepCosts()
        # The arena is the component: two models that share one also share its order.
        self._tracks: dict[object, Track] = {}
        self._parked: dict[Gate, list[Rider]] = {}  # at gates whose bytes are not READY
        self._resident = Track("(resident)")  # the lane of all tracks that need no bus
        self._turn = 0
        self._sweep: Sweep | None = None

    def track(self, gate: Gate) -> Track:
        track = self._tracks.get(gate.arena)
        if track is None:
            track = self._tracks[gate.arena] = Track(gate.component)
        return track

    def after(self, gate: Gate) -> Iterator[Gate]:
        """The gates that will be needed after one that the sweep comes to, nearest first."""
        track, sweep = self.track(gate), self._sweep
        is_last = sweep is not None and sweep.track is track and not track.waiting and sweep.is_last_pass()
        return track.after(gate, is_last)

    # ---- riders come and go

    def stand(self, rider: Rider, gate: Gate, parked: bool) -> None:
        """A rider has come to a gate."""
        track, sweep = self.track(gate), self._sweep
        track.reached(gate, rider.gate)
        rider.gate = gate
        place = track.place[gate]
        if parked:
            self._parked.setdefault(gate, []).append(rider)
        elif sweep is not None and rider.sweep is sweep and track is sweep.track and place > sweep.at:
            sweep.stand(rider, place)
        else:
            self._steps.look(rider)
            self._wait(rider, gate)

    def wake(self) -> None:
        """Look again at who waits for bytes."""
        for gate in [gate for gate in self._parked if gate.is_ready()]:
            for rider in self._parked.pop(gate):
                self._wait(rider, gate)

    def go(self) -> None:
        """The rider that `next` named goes on."""
        assert self._sweep is not None
        self._sweep.pop()

    def drop(self, rider: Rider) -> bool:
        """Let a rider go, wherever it stands; False if it stands nowhere."""
        gate = rider.gate
        if gate is None:
            return False
        track = self.track(gate)
        for table in (self._parked, track.waiting):
            if rider in table.get(gate, ()):
                remove(table, gate, rider)
                return True
        place = track.place[gate]
        if self._sweep is None or self._sweep.track is not track or rider not in self._sweep.at_place(place):
            return False
        self._sweep.drop(rider, place)
        return True

    def standing_at(self, gate: Gate) -> list[Rider]:
        """All who stand at a gate: carried, waiting for a sweep, or for bytes."""
        track, sweep = self.track(gate), self._sweep
        carried = sweep.at_place(track.place.get(gate, -1)) if sweep is not None and sweep.track is track else ()
        return [*carried, *track.waiting.get(gate, ()), *self._parked.get(gate, ())]

    def standing(self) -> list[Rider]:
        """All who stand anywhere."""
        return [rider for track in self._tracks.values() for gate in track.learnt for rider in self.standing_at(gate)]

    def forget(self, gates: Iterable[Gate]) -> None:
        """Drop what was learnt of a model that goes. No rider stands at these gates."""
        for gate in gates:
            track = self._tracks.pop(gate.arena, None)
            if self._sweep is not None and self._sweep.track is track:
                self._sweep = None

    # ---- what riding costs

    def took(self, rider: Rider, gate: Gate, seconds: float) -> None:
        """A rider computed for so long after it passed `gate`."""
        rider.compute_s += seconds
        self.track(gate).costs.took(rider.kind, gate, seconds)

    def _bus_s(self, track: Track) -> float:
        """What a sweep keeps the bus busy. Summed up for each: what is resident may change at any time."""
        return sum(self._bus_s_of_gate(gate) for gate in track.learnt)

    def _due_s(self, rider: Rider) -> float:
        return rider.seated_s + self._steps.remaining_s(rider)

    # ---- the sweep

    def next(self) -> tuple[Rider, Gate] | None:
        """Who goes on, and the gate where it stands until `go` or `drop`; None if nobody can."""
        while True:
            sweep = self._sweep
            place = sweep.next_place() if sweep is not None else None
            if sweep is None or place is None:
                self._sweep = self._begin()
                if self._sweep is None:
                    return None
                continue
            if place != sweep.at:
                sweep.at = place
                self._join(sweep, sweep.track.learnt[place])
            return sweep.at_place(place)[0], sweep.track.learnt[place]

    def _begin(self) -> Sweep | None:
        """A new sweep, of the lane whose turn it is."""
        self.wake()
        lanes: dict[Track, list[Track]] = {}
        for track in self._tracks.values():
            if track.waiting:
                lanes.setdefault(track if self._bus_s(track) else self._resident, []).append(track)
        if not lanes:
            return None
        lane = min(lanes, key=lambda lane: lane.turn)
        self._turn = lane.turn = self._turn + 1
        riders = [rider for track in lanes[lane] for there in track.waiting.values() for rider in there]
        if lane is self._resident:
            first = min(riders, key=self._due_s)
            assert first.gate is not None
            sweep = Sweep(self.track(first.gate), 0.0)
            self._board(sweep, [first])
        else:
            sweep = Sweep(lane, self._bus_s(lane))
            self._board(sweep, sorted(riders, key=self._due_s))
        sweep.at = sweep.next_place() or 0  # who was left at the first gate is not asked again there
        return sweep

    def _board(self, sweep: Sweep, riders: Sequence[Rider]) -> None:
        """Take on those of `riders`, who wait in this order, that are worth it."""
        costs_s = [sweep.track.costs.pass_s(rider.kind) for rider in riders]
        for index in choose(costs_s, sweep.bus_s, sweep.load_s, sweep.carried_count):
            rider = riders[index]
            assert rider.gate is not None
            remove(sweep.track.waiting, rider.gate, rider)
            sweep.carry(rider, rider.gate, costs_s[index])

    def _join(self, sweep: Sweep, gate: Gate) -> None:
        waiting = sweep.track.waiting.get(gate)
        if waiting:
            self._board(sweep, sorted(waiting, key=self._due_s))

    def _wait(self, rider: Rider, gate: Gate) -> None:
        """Wait for a sweep: the one that stands at this very gate, one that comes by, or a later one."""
        track, sweep = self.track(gate), self._sweep
        track.waiting.setdefault(gate, []).append(rider)
        if sweep is None:
            return
        if not sweep.bus_s:
            self._overtake(sweep, rider, track)
        elif track is sweep.track and track.place[gate] == sweep.at and rider.sweep is not sweep:
            self._board(sweep, [rider])  # once a sweep: who comes back to a gate has ended its pass

    def _overtake(self, sweep: Sweep, rider: Rider, track: Track) -> None:
        """Among residents a rider that is due sooner goes first, at any gate: nothing was brought for the other."""
        place = sweep.next_place()
        if place is None or self._bus_s(track):
            return
        ahead = sweep.at_place(place)[0]
        if self._due_s(rider) < self._due_s(ahead):
            self._sweep = None
            sweep.track.waiting.setdefault(sweep.track.learnt[place], []).append(ahead)


def remove(table: dict[Gate, list[Rider]], gate: Gate, rider: Rider) -> None:
    """Take a rider out of a table that has no empty lists."""
    table[gate].remove(rider)
    if not table[gate]:
        del table[gate]
