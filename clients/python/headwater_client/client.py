"""The client, written once. AsyncClient is it; Client (blocking.py) runs the same coroutines without a loop."""

import itertools
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, Self, Unpack

import grpc
from headwater.sampler.v1 import sampler_pb2 as pb

from . import addresses, status, wire
from .assembly import Assembly, result
from .attempts import Attempts
from .events import Event, Result
from .options import Options
from .replies import Model, ModelDetails, Preparation, Status
from .transport import Asyncio, Transport, stub

ANSWER_TIMEOUT_S = 30.0


class AsyncClient:
    """Calls of a sampler for asyncio code; belongs to the loop of its first call. Use with `async with`, or aclose it.

    address: "unix:/path" or "host:port", or several; see addresses.parse for the default. Calls go round them.
    retries: further attempts of a call that ended UNAVAILABLE or QUEUE_FULL before it was started. By default each
    address is tried once. Every method raises HeadwaterError.
    """

    def __init__(
        self,
        address: str | Sequence[str] | None = None,
        *,
        retries: int | None = None,
        transport: Transport | None = None,
    ) -> None:
        self.addresses = addresses.parse(address)
        self.retries = len(self.addresses) - 1 if retries is None else retries
        self._transport = transport or Asyncio()
        self._turn = itertools.count()
        self._lanes: dict[str, tuple[Any, Any]] = {}
        self._calls: set[Any] = set()
        self._lock = threading.Lock()
        self._closed = False

    async def generate(
        self,
        prompt: str,
        *,
        timeout: float | None = None,
        on_event: Callable[[Event], object] | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """Draw and wait for all of it. timeout: seconds for everything; on_event: called with each event as it comes.

        Cancelling the task, and whatever on_event raises, cancels the work on the server.
        """
        seen: list[Event] = []
        async with aclosing(self.stream(prompt, timeout=timeout, **options)) as events:
            async for event in events:
                seen.append(event)
                if on_event is not None:
                    on_event(event)
        return result(seen)

    async def stream(
        self, prompt: str, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> AsyncGenerator[Event, None]:
        """Draw and see it happen: Queued*, Started, then Progress, Preview and Image, last Finished.

        Closing the iterator cancels the work on the server; leaving `async for` closes it soon, aclosing() at once.
        """
        request = wire.generate_request(prompt, options)
        request.request_id = request.request_id or str(uuid.uuid4())
        assembly = Assembly()
        async with aclosing(self._messages("Generate", request, timeout, _started)) as messages:
            async for message in messages:
                event = assembly.event(message)
                if event is not None:
                    yield event
        assembly.end()

    async def models(self, *, timeout: float | None = ANSWER_TIMEOUT_S) -> tuple[Model, ...]:
        """The models that the server can draw with, by name."""
        reply = await self._reply("ListModels", pb.ListModelsRequest(), timeout)
        return tuple(wire.model(each) for each in reply.models)

    async def model(self, name: str = "", *, timeout: float | None = ANSWER_TIMEOUT_S) -> ModelDetails:
        """One model with its defaults; without a name, the only one that is served."""
        return wire.model_details(await self._reply("GetModel", pb.GetModelRequest(model=name), timeout))

    async def prepare(
        self, name: str = "", *, background: bool = False, timeout: float | None = None
    ) -> AsyncGenerator[Preparation, None]:
        """Bring a model into the host's memory and see it happen. Closing the iterator does not stop it.

        background: only while nobody waits for anything else, and only as long as the iterator is open.
        """
        request = pb.PrepareModelRequest(model=name, background=background)
        async with aclosing(self._messages("PrepareModel", request, timeout, lambda _: True)) as messages:
            async for message in messages:
                yield wire.preparation(message)

    async def status(self, *, timeout: float | None = ANSWER_TIMEOUT_S) -> Status:
        """What the replica is doing now."""
        return wire.status(await self._reply("GetStatus", pb.GetStatusRequest(), timeout))

    async def aclose(self) -> None:
        """Close the connections; calls in flight end as Cancelled. May be called again."""
        self._closed = True
        for call in list(self._calls):
            call.cancel()
        while self._lanes:
            _, (channel, _) = self._lanes.popitem()
            await self._transport.close(channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def _reply(self, method: str, request: Any, timeout: float | None) -> Any:
        attempts = self._attempts(timeout)
        while True:
            unary = self._method(attempts, method)
            try:
                with self._track(self._transport.unary(unary, request, attempts.left_s)) as call:
                    return await self._transport.reply(call)
            except grpc.RpcError as error:
                await self._again(attempts, error, False, False)

    async def _messages(
        self, method: str, request: Any, timeout: float | None, commits: Callable[[Any], bool]
    ) -> AsyncGenerator[Any, None]:
        """Messages of a stream, tried again until one `commits` the server to it. Cancels the call on the way out."""
        attempts = self._attempts(timeout)
        committed = heard = False
        while True:
            stream = self._method(attempts, method)
            try:
                with self._track(stream(request, timeout=attempts.left_s)) as call:
                    while (message := await self._transport.read(call)) is not None:
                        heard, committed = True, committed or commits(message)
                        yield message
                    return
            except grpc.RpcError as error:
                await self._again(attempts, error, heard, committed)

    @contextmanager
    def _track(self, call: Any) -> Iterator[Any]:
        """Cancel the call on the way out, and let aclose cancel it before."""
        self._calls.add(call)
        try:
            yield call
        finally:
            self._calls.discard(call)
            call.cancel()

    async def _again(self, attempts: Attempts, error: grpc.RpcError, heard: bool, committed: bool) -> None:
        """Wait until the next attempt is due; raises what `error` means if there is none."""
        meaning = status.from_rpc(error, attempts.address, heard)
        delay = None if committed else attempts.next(meaning)
        if delay is None:
            raise meaning from error
        await self._transport.sleep(delay)

    def _attempts(self, timeout: float | None) -> Attempts:
        return Attempts(self.addresses, next(self._turn), self.retries, timeout)

    def _method(self, attempts: Attempts, name: str) -> Any:
        """A method of the service at the attempt's address."""
        address = attempts.address
        with self._lock:
            if self._closed:
                raise RuntimeError("the client is closed")
            if address not in self._lanes:
                channel = self._transport.channel(address)
                self._lanes[address] = channel, stub(channel)
            return getattr(self._lanes[address][1], name)


def _started(message: pb.GenerateResponse) -> bool:
    return message.WhichOneof("event") not in ("queued", None)
