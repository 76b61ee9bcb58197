"""The shared sweep: every rider that waits for a component rides one pass over its gates.

One baton: at any moment exactly one thread runs model code, that of the rider which holds it. A rider gives it on at
each gate, in its own thread: it picks who goes next, opens that rider's gate and releases that rider's lock. So a lone
rider never switches threads, and there is no engine thread. When nobody can go on (all wait for bytes, or nobody is
there) the baton lies on the table, and whoever brings news (`ride`, `cancel`, `wake`) takes it up.

The engine is driven by where riders stand. A sweep visits the gates of a component in the order learnt from the first
forward and runs the riders that stand there; a wrong order costs time, never pixels. Gates whose bytes are not in the
arena yet are passed over, and their riders wait while others go on.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import structlog

from services.errors import Cancelled
from services.sampler.gates import Gate
from services.sampler.riders import Rider
from services.sampler.transfer import Transfer

log = structlog.get_logger()


class Track:
    """The gates of one component, in the order in which forwards reach them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.learnt: list[Gate] = []
        self.place: dict[Gate, int] = {}
        self.cycles = False  # whether forwards follow each other, as denoise steps do

    def reached(self, gate: Gate, before: Gate | None) -> None:
        """Learn from a rider that came to `gate` from `before`."""
        if gate not in self.place:
            self.place[gate] = len(self.learnt)
            self.learnt.append(gate)
        elif before in self.place and self.place[gate] < self.place[before]:
            self.cycles = True

    def after(self, gate: Gate) -> Iterator[Gate]:
        """The gates that will be needed after `gate`, nearest first; then the next forward's, if one follows."""
        at = self.place[gate] + 1
        yield from self.learnt[at:]
        if self.cycles:
            yield from self.learnt[:at]


class Engine:
    """Runs riders' work, one at a time, and brings each gate's params once for all that stand there.

    State is touched only by the thread that holds the baton; `_news` and `_idle` by any thread under `_mutex`.
    """

    def __init__(self, transfer: Transfer) -> None:
        self.transfer = transfer
        self._mutex = threading.Lock()
        self._news: deque[Callable[[], None]] = deque()
        self._idle = True  # the baton lies on the table
        self._runnable: deque[Rider] = deque()  # no gate to wait for: new, or to be ended
        self._standing: dict[Gate, deque[Rider]] = {}
        self._away: set[Rider] = set()  # waiting for what no gate brings
        self._tracks: dict[object, Track] = {}
        self._open: Gate | None = None
        self._local = threading.local()

    # ---- called from anywhere

    def ride(self, rider: Rider) -> None:
        """Start a rider; returns at once."""
        threading.Thread(target=self._run, args=(rider,), name="rider", daemon=True).start()

    def cancel(self, rider: Rider) -> None:
        """End a rider's work at its next gate, or where it waits."""

        def free() -> None:
            if rider.fault is None:
                rider.fault = Cancelled("the caller went away")
            if rider.gate is not None and rider in self._standing.get(rider.gate, ()):
                self._take(rider.gate, rider)
                self._runnable.append(rider)
            self._back(rider)

        self._tell(free)

    def fail(self, gates: Iterable[Gate], error: Exception) -> None:
        """End riders that wait at these gates for bytes that will not come."""

        def end() -> None:
            for gate in gates:
                if gate in self._standing and not gate.is_ready():
                    self._fail(gate, error)

        self._tell(end)

    def wake(self) -> None:
        """Look again: more extents are READY."""
        self._tell(lambda: None)

    # ---- called by riders, holding the baton

    def arrive(self, gate: Gate) -> None:
        """Stop at a gate until its params are there. Raises Cancelled or what went wrong with them."""
        rider: Rider | None = getattr(self._local, "rider", None)
        if rider is None:
            raise RuntimeError(f"{gate} was reached outside a rider")
        rider.raise_fault()
        self._track(gate).reached(gate, rider.gate)
        rider.gate, rider.since = gate, time.monotonic()
        parked = not gate.is_ready()
        if parked:
            rider.on_gate(gate, True)
        self._standing.setdefault(gate, deque()).append(rider)
        self._give_on(rider)
        rider.raise_fault()
        rider.costs.streamed_bytes += self.transfer.streamed_bytes_of(gate)
        if parked:
            rider.costs.stall_s += time.monotonic() - rider.since
        rider.on_gate(gate, False)

    def stand_by(self, gate: Gate, start: Callable[[Callable[[], None]], None]) -> None:
        """Wait in front of a gate, without the baton, until what `start` was given is called, from any thread.

        Raises Cancelled as soon as the caller goes away.
        """
        rider: Rider = self._local.rider
        rider.raise_fault()
        rider.on_gate(gate, True)
        self._away.add(rider)
        start(lambda: self._tell(lambda: self._back(rider)))
        self._give_on(rider)
        rider.raise_fault()

    def leave(self, gate: Gate) -> None:
        """Close a gate before the next one is reached, so that its memory can be used for others."""
        if self._open is gate and gate not in self._standing:
            self._close()

    def settle(self) -> None:
        """Close the open gate, whoever stands there: what the transfer holds is about to be planned anew."""
        self._close()

    # ---- the baton

    def _run(self, rider: Rider) -> None:
        self._local.rider = rider
        self._tell(lambda: self._runnable.append(rider))
        rider.turn.acquire()
        try:
            rider.raise_fault()
            self.transfer.bind_thread()
            rider.result = rider.work(rider)
        except BaseException as error:
            rider.error = error
        try:
            self._give_on(None)
        finally:
            rider.on_done(rider)

    def _tell(self, news: Callable[[], None]) -> None:
        with self._mutex:
            self._news.append(news)
            if not self._idle:
                return
            self._idle = False
        self._give_on(None)

    def _give_on(self, me: Rider | None) -> None:
        following = self._next_or_rest()
        if following is me and me is not None:
            return
        if following is not None:
            following.turn.release()
        if me is not None:
            me.turn.acquire()

    def _next_or_rest(self) -> Rider | None:
        while True:
            while self._news:
                self._news.popleft()()
            rider = self._next()
            if rider is not None:
                return rider
            self._close()
            with self._mutex:
                if not self._news:
                    self._idle = True
                    return None

    # ---- the sweep

    def _next(self) -> Rider | None:
        """The rider to run now, its gate open; None if nobody can run."""
        while not self._runnable:
            gate = self._pick()
            if gate is None:
                return None
            try:
                self._enter(gate)
            except Exception as error:
                self._fail(gate, error)
                continue
            return self._take(gate, self._standing[gate][0])
        return self._runnable.popleft()

    def _pick(self) -> Gate | None:
        """The open gate while riders stand there, else the sweep's next, else the first of a new sweep.

        A new sweep goes to the component whose rider has stood longest, so none starves another.
        """
        waiting = [gate for gate in self._standing if gate.is_ready()]
        if not waiting:
            return None
        if self._open is not None:
            if self._open in waiting:
                return self._open
            track = self._track(self._open)
            here = track.place[self._open]
            ahead = [g for g in waiting if self._track(g) is track and track.place[g] > here]
            if ahead:
                return min(ahead, key=track.place.__getitem__)
        eldest = min(waiting, key=lambda g: self._standing[g][0].since)
        track = self._track(eldest)
        return min((g for g in waiting if self._track(g) is track), key=track.place.__getitem__)

    def _enter(self, gate: Gate) -> None:
        if self._open is gate:
            return
        self._close()
        self.transfer.enter(gate)
        self._open = gate
        self.transfer.prefetch(gate, self._track(gate).after(gate))

    def _close(self) -> None:
        gate, self._open = self._open, None
        if gate is None:
            return
        try:
            self.transfer.leave(gate)
        except RuntimeError:  # a device in trouble says so again to the next rider, which then fails with it
            log.exception("closing a gate failed", gate=str(gate))

    def _take(self, gate: Gate, rider: Rider) -> Rider:
        riders = self._standing[gate]
        riders.remove(rider)
        if not riders:
            del self._standing[gate]
        return rider

    def _back(self, rider: Rider) -> None:
        if rider in self._away:
            self._away.discard(rider)
            self._runnable.append(rider)

    def _fail(self, gate: Gate, error: Exception) -> None:
        riders = self._standing.pop(gate)
        for rider in riders:
            rider.fault = error
        self._runnable.extend(riders)

    def _track(self, gate: Gate) -> Track:
        # The arena is the component: two models that share one also share its order.
        return self._tracks.setdefault(gate.arena, Track(gate.component))

    def forget(self, gates: list[Gate]) -> None:
        """Drop what was learnt of a model that goes. The caller holds the baton and no rider stands at these gates."""
        for gate in gates:
            self._standing.pop(gate, None)
            self._tracks.pop(gate.arena, None)
