"""The shared sweep: every rider that waits for a component rides one pass over its gates.

One baton: at any moment exactly one thread runs model code, that of the rider which holds it. A rider gives it on at
each gate, in its own thread: it asks `sweeps.py` who goes next, opens that rider's gate and releases that rider's lock.
So a lone rider never switches threads, and there is no engine thread. When nobody can go on (all wait for bytes, or
nobody is there) the baton lies on the table, and whoever brings news (`ride`, `cancel`, `wake`) takes it up.

The engine is driven by where riders stand. A sweep visits the gates of a component in the order learnt from the first
forward and runs the riders that stand there; a wrong order costs time, never pixels. Riders at gates whose bytes are
not in the arena yet are parked, and others go on.

An error in bringing a gate belongs to the riders that stand there. One that says that the device is lost belongs to
all, also to those that come later: they end with DeviceGone, and `on_gone` is called once.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

import structlog

from services.errors import Cancelled, DeviceGone
from services.sampler.faults import is_device_fault, is_lost, is_memory_full
from services.sampler.gates import Gate
from services.sampler.meter import Meter, WallMeter
from services.sampler.riders import Rider
from services.sampler.sweeps import Sweeps
from services.sampler.threads import Threads
from services.sampler.transfer import Transfer

log = structlog.get_logger()


class Engine:
    """Runs riders' work, one at a time, and brings each gate's params once for all that a sweep carries.

    State is touched only by the thread that holds the baton; `_news` and `_idle` by any thread under `_mutex`.
    `on_gone`, and `on_starved` with a gate whose bytes a rider has to wait for, are called by the holder of the baton
    and must not block. `clock` gives seconds and never goes back.
    """

    def __init__(
        self, transfer: Transfer, meter: Meter | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.transfer = transfer
        self.gone: DeviceGone | None = None
        self.on_gone: Callable[[], object] = lambda: None
        self.on_starved: Callable[[Gate], object] = lambda gate: None
        self._meter = meter or WallMeter()
        self._clock = clock
        self._mutex = threading.Lock()
        self._news: deque[Callable[[], None]] = deque()
        self._idle = True  # the baton lies on the table
        self._runnable: deque[Rider] = deque()  # no gate to wait for: new, or to be ended
        self._sweeps = Sweeps(lambda gate: transfer.streamed_bytes_of(gate) / self._meter.bus_bytes_per_s)
        self._away: set[Rider] = set()  # waiting for what no gate brings
        self._failed: dict[Gate, Exception] = {}  # gates whose bytes will not come
        self._open: Gate | None = None
        self._local = threading.local()
        self._threads = Threads("rider")

    # ---- called from anywhere

    def ride(self, rider: Rider) -> None:
        """Start a rider; returns at once."""
        rider.seated_s = self._clock()
        self._threads.start(lambda: self._run(rider))

    def cancel(self, rider: Rider) -> None:
        """End a rider's work at its next gate, or where it waits."""

        def free() -> None:
            if rider.fault is None:
                rider.fault = Cancelled("the caller went away")
            if self._sweeps.drop(rider):
                self._runnable.append(rider)
            self._back(rider)

        self._tell(free)

    def fail(self, gates: Iterable[Gate], error: Exception) -> None:
        """End riders that wait at these gates for bytes that will not come, and those that come there later."""

        def end() -> None:
            for gate in gates:
                if not gate.is_ready():
                    self._failed[gate] = error  # for who comes later
                    self._end(self._sweeps.standing_at(gate), error)

        self._tell(end)

    def wake(self) -> None:
        """Look again: more extents are READY."""
        self._tell(self._sweeps.wake)

    def lost(self, error: Exception) -> DeviceGone | None:
        """What an error seen outside of riders' work says of the device: if that it is lost, all riders end."""
        if not is_lost(error, self.transfer.device):
            return None

        def end() -> None:
            self._lose(error)

        self._tell(end)
        return device_gone()

    # ---- called by riders, holding the baton

    def arrive(self, gate: Gate) -> None:
        """Stop at a gate until its params are there. Raises Cancelled or what went wrong with them."""
        rider: Rider | None = getattr(self._local, "rider", None)
        if rider is None:
            raise RuntimeError(f"{gate} was reached outside a rider")
        self._stop_meter(rider)
        rider.raise_fault()
        parked = not gate.is_ready()
        if parked and gate in self._failed:
            raise self._failed[gate]
        if gate.pinned and not parked:
            self._pass_pinned(gate)
            rider.on_gate(gate, False)
            return
        if parked:
            since = self._clock()
            rider.on_gate(gate, True)
            self.on_starved(gate)
        self._sweeps.stand(rider, gate, parked)
        rider.on_pause()
        self._give_on(rider)
        rider.raise_fault()
        rider.costs.streamed_bytes += self.transfer.streamed_bytes_of(gate)
        if parked:
            rider.costs.stall_s += self._clock() - since
        rider.on_gate(gate, False)
        rider.mark = self._meter.start()

    def stand_by(self, gate: Gate, start: Callable[[Callable[[], None]], None], prepares: bool = True) -> None:
        """Wait in front of a gate, without the baton, until what `start` was given is called, from any thread.

        prepares: what is waited for comes before the gate's own work; else another rider does that work.
        Raises Cancelled as soon as the caller goes away.
        """
        rider: Rider = self._local.rider
        self._stop_meter(rider)
        rider.raise_fault()
        rider.on_pause()  # first: who passes a gate is measured from there on
        rider.on_gate(gate, prepares)
        self._away.add(rider)
        start(lambda: self._tell(lambda: self._back(rider)))
        self._give_on(rider)
        rider.raise_fault()
        rider.on_gate(gate, False)

    def leave(self, gate: Gate) -> None:
        """Close a gate before the next one is reached, so that its memory can be used for others."""
        if self._open is gate and not self._sweeps.standing_at(gate):
            self._close()

    def settle(self) -> None:
        """Close the open gate, whoever stands there: what the transfer holds is about to be planned anew."""
        self._close()

    def forget(self, gates: list[Gate]) -> None:
        """Drop what was learnt of a model that goes. The caller holds the baton and no rider stands at these gates."""
        self._sweeps.forget(gates)
        for gate in gates:
            self._failed.pop(gate, None)

    # ---- the baton

    def _run(self, rider: Rider) -> None:
        self._local.rider = rider
        self._tell(lambda: self._runnable.append(rider))
        rider.turn.acquire()
        try:
            if self.gone is not None:
                raise self.gone  # noqa: TRY301 - as if its first gate had said so
            rider.raise_fault()
            self.transfer.bind_thread()
            rider.result = rider.work(rider)
            self._stop_meter(rider)
        except BaseException as error:
            rider.error = self._lose(error) if is_lost(error, self.transfer.device) else error
        self._local.rider = None
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
                if not self._news and not self._runnable:
                    self._idle = True
                    return None

    def _next(self) -> Rider | None:
        """The rider to run now, its gate open; None if nobody can run."""
        while not self._runnable:
            following = self._sweeps.next()
            if following is None:
                return None
            rider, gate = following
            try:
                self._enter(gate)
            except Exception as error:
                self._not_entered(rider, gate, error)
                continue
            if self.gone is None:
                self._sweeps.go()
                return rider
        return self._runnable.popleft()

    # ---- the open gate

    def _enter(self, gate: Gate) -> None:
        if self._open is gate:
            return
        self._close()
        self.transfer.enter(gate)
        self._open = gate
        try:
            self.transfer.prefetch(gate, self._sweeps.after(gate))
        except Exception as error:
            if not is_memory_full(error):
                raise
            # Nobody's yet: whoever comes to that gate has more room, or hears of it.
            log.debug("no memory to bring a gate ahead of time", after=str(gate))

    def _pass_pinned(self, gate: Gate) -> None:
        """What stays on the device once it is there needs no sweep, and a newcomer need not wait for one."""
        self._close()
        self.transfer.enter(gate)
        self.transfer.leave(gate)

    def _close(self) -> None:
        gate, self._open = self._open, None
        if gate is None:
            return
        try:
            self.transfer.leave(gate)
        except RuntimeError as error:
            log.exception("closing a gate failed", gate=str(gate))
            if is_device_fault(error):
                self._lose(error)

    # ---- what goes wrong

    def _back(self, rider: Rider) -> None:
        if rider in self._away:
            self._away.discard(rider)
            self._runnable.append(rider)

    def _not_entered(self, rider: Rider, gate: Gate, error: Exception) -> None:
        """A gate could not be brought for `rider`, nor for others that stand there unless it was for want of memory."""
        if is_device_fault(error):
            self._lose(error)
        elif is_memory_full(error):
            self._end([rider], error)
        else:
            self._end(self._sweeps.standing_at(gate), error)

    def _end(self, riders: Iterable[Rider], error: Exception) -> None:
        for rider in riders:
            self._sweeps.drop(rider)
            self._away.discard(rider)
            rider.fault = error
            self._runnable.append(rider)

    def _lose(self, error: BaseException) -> DeviceGone:
        """The device is lost: end everybody, now and from now on."""
        if self.gone is None:
            self.gone = device_gone()
            log.error("the device is lost", device=str(self.transfer.device), exc_info=error)
            self.on_gone()
        self._end([*self._sweeps.standing(), *self._away], self.gone)
        return self.gone

    def _stop_meter(self, rider: Rider) -> None:
        mark, rider.mark = rider.mark, None
        if mark is not None and rider.gate is not None:
            self._meter.stop(mark, functools.partial(self._sweeps.took, rider, rider.gate))


def device_gone() -> DeviceGone:
    return DeviceGone("this replica's device has failed and the replica ends: try another one")
