"""A run of a workload by closed-loop clients, on asyncio. Knows no terminal."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from .client import AsyncClient
from .errors import HeadwaterError
from .events import Result
from .measures import Failure, Sample, Summary, Watch, failures, summarize
from .workload import Workload

Keep = Callable[[int, Result], Awaitable[None]]
Tell = Callable[[], None]


class Run:
    """One run of a workload. Its samples grow while it runs, so that one that was cut short can be told, too."""

    def __init__(self, workload: Workload, clock: Callable[[], float] = time.monotonic) -> None:
        self.workload = workload
        self.warm_up: list[Sample] = []
        self.samples: list[Sample] = []
        self.complete = False
        self._clock = clock
        self._began_s: float | None = None
        self._ended_s: float | None = None

    @property
    def began(self) -> bool:
        """Whether the warm-up is over."""
        return self._began_s is not None

    @property
    def failed(self) -> bool:
        """Whether a request failed, be it one of the warm-up."""
        return any(sample.failure is not None for sample in self.warm_up + self.samples)

    @property
    def elapsed_s(self) -> float:
        """Seconds from the first measured request to the end of the last, or until now."""
        if self._began_s is None:
            return 0.0
        return (self._clock() if self._ended_s is None else self._ended_s) - self._began_s

    @property
    def warm_up_failures(self) -> tuple[Failure, ...]:
        """What went wrong before the measurement."""
        return failures(self.warm_up)

    def summary(self) -> Summary:
        """The figures so far, without the warm-up."""
        return summarize(self.samples, self.elapsed_s)

    async def drive(self, client: AsyncClient, keep: Keep | None = None, tell: Tell = lambda: None) -> None:
        """Send all of it, and end when the last request has ended. A failed request stops nothing; cancelling does.

        keep: awaited by a request's client with its index and result; it counts in no latency, but in the elapsed
        time, and what it raises ends the run. tell: called after each request, those of the warm-up included.
        """

        async def warm(index: int) -> None:
            sample, _ = await self._ask(client, index)
            self.warm_up.append(sample)
            tell()

        async def measure(index: int) -> None:
            sample, result = await self._ask(client, index)
            self.samples.append(sample)
            tell()
            if keep is not None and result is not None:
                await keep(index, result)

        await self._send(self.workload.warm_up_count, warm)
        with self._timed():
            await self._send(self.workload.request_count, measure)
        self.complete = True

    @contextmanager
    def _timed(self) -> Iterator[None]:
        self._began_s = self._clock()
        try:
            yield
        finally:
            self._ended_s = self._clock()

    async def _send(self, count: int, ask: Callable[[int], Awaitable[None]]) -> None:
        """Closed loop: each client takes the next request of the queue as soon as its last one has ended."""
        queue = iter(range(count))

        async def work() -> None:
            for index in queue:
                await ask(index)

        try:
            async with asyncio.TaskGroup() as clients:
                for _ in range(min(self.workload.client_count, count)):
                    clients.create_task(work())
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _ask(self, client: AsyncClient, index: int) -> tuple[Sample, Result | None]:
        prompt, options = self.workload.request(index)
        watch = Watch()
        try:
            result = await client.generate(prompt, timeout=self.workload.timeout, on_event=watch, **options)
        except HeadwaterError as error:
            return watch.stop(error), None
        return watch.stop(result.finished), result
