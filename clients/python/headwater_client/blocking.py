"""The client for code without a loop: AsyncClient's own coroutines, run to their end in the calling thread."""

from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from typing import Self, TypeVar, Unpack

from .client import ANSWER_TIMEOUT_S, AsyncClient
from .events import Event, Result
from .options import Options
from .replies import Model, ModelDetails, Preparation, Status
from .transport import Blocking, run

T = TypeVar("T")


class Client:
    """Calls of a sampler, blocking; threads may share one. Use with `with`, or close it. Arguments as AsyncClient's.

    Ctrl-C cancels the call that it interrupts. Every method raises HeadwaterError.
    """

    def __init__(self, address: str | Sequence[str] | None = None, *, retries: int | None = None) -> None:
        self._client = AsyncClient(address, retries=retries, transport=Blocking())

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where calls go."""
        return self._client.addresses

    def generate(
        self,
        prompt: str,
        *,
        timeout: float | None = None,
        on_event: Callable[[Event], object] | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """Draw and wait for all of it. timeout: seconds for everything; on_event: called with each event as it comes.

        Whatever on_event raises cancels the work on the server.
        """
        return run(self._client.generate(prompt, timeout=timeout, on_event=on_event, **options))

    def stream(
        self, prompt: str, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Generator[Event, None, None]:
        """Draw and see it happen: Queued*, Started, then Progress, Preview and Image, last Finished.

        Leaving the loop, or closing the iterator where it is held, cancels the work on the server.
        """
        return _iterate(self._client.stream(prompt, timeout=timeout, **options))

    def models(self, *, timeout: float | None = ANSWER_TIMEOUT_S) -> tuple[Model, ...]:
        """The models that the server can draw with, by name."""
        return run(self._client.models(timeout=timeout))

    def model(self, name: str = "", *, timeout: float | None = ANSWER_TIMEOUT_S) -> ModelDetails:
        """One model with its defaults; without a name, the only one that is served."""
        return run(self._client.model(name, timeout=timeout))

    def prepare(
        self, name: str = "", *, background: bool = False, timeout: float | None = None
    ) -> Generator[Preparation, None, None]:
        """Bring a model into the host's memory and see it happen. Closing the iterator does not stop it.

        background: only while nobody waits for anything else, and only as long as the iterator is open.
        """
        return _iterate(self._client.prepare(name, background=background, timeout=timeout))

    def status(self, *, timeout: float | None = ANSWER_TIMEOUT_S) -> Status:
        """What the replica is doing now."""
        return run(self._client.status(timeout=timeout))

    def close(self) -> None:
        """Close the connections; calls in flight end as Cancelled. May be called again."""
        run(self._client.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _iterate(source: AsyncGenerator[T, None]) -> Generator[T, None, None]:
    try:
        while True:
            try:
                item = run(_next(source))
            except StopAsyncIteration:
                return
            yield item
    finally:
        run(source.aclose())


async def _next(source: AsyncGenerator[T, None]) -> T:
    return await anext(source)
