"""A request from arrival to its last picture: queue, riders, events in order. No grpc."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Hashable
from contextlib import aclosing
from dataclasses import replace

from PIL import Image

from services.errors import DuplicateRequest
from services.sampler import heap
from services.sampler.admission import Admission, Seat
from services.sampler.drawing import Drawing, EmitPreview
from services.sampler.encoding import encoded, png
from services.sampler.engine import Engine
from services.sampler.library import Library
from services.sampler.model import AttachedModel
from services.sampler.pixels import Pixels
from services.sampler.requests import Event, Finished, ImageRequest, Phase, Picture, Preview, Progress, Queued, Started
from services.sampler.riders import Rider
from services.sampler.tiling import TileRule
from services.sampler.workspace import Workspace

# How often a picture that waits for params says how far the fill is.
HEARTBEAT_S = 0.5


class Sampler:
    """Draws requests on one engine. All methods belong to one event loop."""

    def __init__(
        self, library: Library, engine: Engine, workspace: Workspace, admission: Admission, tile_rule: TileRule
    ) -> None:
        self.library = library
        self.engine = engine
        self.workspace = workspace
        self.admission = admission
        self.image_count = 0
        self._tile_rule = tile_rule
        self._live: set[str] = set()
        self._jobs: set[asyncio.Task[None]] = set()

    async def generate(self, request: ImageRequest) -> AsyncGenerator[Event, None]:
        """Events of a request, Finished last. Closing the iterator cancels the work at the next gate.

        Raises DuplicateRequest, InvalidRequest, QueueFull, what attaching the model raises, DeviceMemoryFull,
        DeviceGone.
        """
        if request.request_id in self._live:
            raise DuplicateRequest(f"a request {request.request_id} is in flight here: use another request_id")
        self._live.add(request.request_id)
        try:
            async with self.library.using(request.model) as model:
                resolved = model.abilities.resolve(replace(request, model=model.name), self._tile_rule)
                if resolved.reference_images:  # not on the event loop, nor under the baton
                    resolved = await asyncio.to_thread(model.abilities.fitted, resolved)
                async with aclosing(self._ride(model, resolved)) as events:
                    async for event in events:
                        yield event
        finally:
            self._live.discard(request.request_id)

    async def _ride(self, model: AttachedModel, request: ImageRequest) -> AsyncGenerator[Event, None]:
        arrived = time.monotonic()
        seat = self.admission.seat()
        try:
            async for position, estimate_s in seat.wait():
                yield Queued(position, estimate_s)
        except BaseException:
            seat.leave()
            raise
        queue_s = time.monotonic() - arrived
        job = Job(self, model, request, seat)
        try:
            yield Started(request)
            async for event in job.events():
                yield event
            yield job.finished(queue_s)
        finally:
            job.cancel()

    def spawn(self, job: asyncio.Task[None]) -> None:
        """Keep a task of a job alive, also after its caller went away."""
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)

    async def close(self) -> None:
        """Wait until every rider has ended, then detach the models. Calls must have been cancelled or done."""
        if self._jobs:
            await asyncio.wait(set(self._jobs))
        await self.library.close()


class Job:
    """The pictures of one admitted request, each drawn by a rider of its own."""

    def __init__(self, sampler: Sampler, model: AttachedModel, request: ImageRequest, seat: Seat) -> None:
        self._sampler = sampler
        self._model = model
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._started = time.monotonic()
        self._waiting: set[int] = set()  # pictures that wait for params
        self._riders: list[Rider] = []
        self._drawings: list[Drawing] = []
        self._closed = False
        self._size_px = (request.width_px, request.height_px)
        sampler.spawn(asyncio.create_task(self._draw_all(seat)))

    async def events(self) -> AsyncGenerator[Event, None]:
        """Progress and previews as they come, pictures in the order of their index; ends after the last picture."""
        pictures: dict[int, Picture] = {}
        sent = 0
        while sent < self._request.count:
            event = await self._next_event()
            if isinstance(event, Picture):
                self._size_px = (event.width_px, event.height_px)  # edits: as the pipeline chose it
                pictures[event.image_index] = event
                while sent in pictures:
                    yield pictures.pop(sent)
                    sent += 1
            else:
                yield event

    def finished(self, queue_s: float) -> Finished:
        phase_s: dict[Phase, float] = {}
        for drawing in self._drawings:
            for phase, seconds in drawing.phase_s.items():
                phase_s[phase] = phase_s.get(phase, 0.0) + seconds
        width, height = self._size_px
        return Finished(
            request=replace(self._request, width_px=width, height_px=height),
            queue_s=queue_s,
            run_s=time.monotonic() - self._started,
            stall_s=sum(rider.costs.stall_s for rider in self._riders),
            streamed_bytes=sum(rider.costs.streamed_bytes for rider in self._riders),
            phase_s=phase_s,
        )

    async def _next_event(self) -> Event:
        while True:
            try:
                event = await asyncio.wait_for(self._news.get(), HEARTBEAT_S)
            except TimeoutError:
                if not self._waiting:
                    continue
                ready, total = self._model.ready_bytes, self._model.size_bytes
                return Progress(min(self._waiting), Phase.PREPARING, ready_bytes=ready, total_bytes=total)
            if isinstance(event, Exception):
                raise event
            return event

    async def _draw_all(self, first: Seat) -> None:
        """Seat one rider after the other and wait until all have ended. Outlives the caller."""
        ended = []
        for index in range(self._request.count):
            seat = first if index == 0 else self._sampler.admission.seat(further=True)
            async for _ in seat.wait():
                pass
            if self._closed:
                seat.leave()
                break
            ended.append(self._start(index, seat))
        if ended:
            await asyncio.wait(ended)

    def _start(self, index: int, seat: Seat) -> asyncio.Future[None]:
        workspace = self._sampler.workspace
        drawing = Drawing(self._model, workspace, self._request, index, self._post, self._preview_poster(index))
        ended: asyncio.Future[None] = self._loop.create_future()

        def end(outcome: Event | Exception) -> None:
            seat.leave()  # first: who hears of the picture finds the seat free
            self._sampler.library.release(self._model)
            ended.set_result(None)
            self._take(outcome)

        def done(rider: Rider) -> None:
            # In the rider's thread, after the baton went on: encoding a picture stops nobody.
            self._loop.call_soon_threadsafe(end, self._outcome(rider, index))
            heap.give_back()

        rider = Rider(
            lambda rider: drawing.draw(),
            done,
            drawing.passed,
            drawing.paused,
            kind=shape_of(self._request),
            steps_left=lambda: max(0, drawing.step_count - drawing.step),
        )
        self._riders.append(rider)
        self._drawings.append(drawing)
        self._sampler.library.keep(self._model)
        self._sampler.engine.ride(rider)
        return ended

    def _outcome(self, rider: Rider, index: int) -> Event | Exception:
        if isinstance(rider.error, Exception):
            return rider.error
        assert isinstance(rider.result, Pixels)
        request = self._request
        try:
            image = rider.result.image()
            file = encoded(image, request.format, request.quality)
        except Exception as error:  # nobody else hears of it in this thread
            return self._sampler.engine.lost(error) or error
        self._sampler.image_count += 1
        return Picture(index, file, request.format, *image.size, request.seed_of(index))

    def cancel(self) -> None:
        """End what still rides, at the next gate, and start nothing more."""
        self._closed = True
        for rider in self._riders:
            self._sampler.engine.cancel(rider)

    # ---- called in riders' threads

    def _post(self, event: Event | Exception) -> None:
        self._loop.call_soon_threadsafe(self._take, event)

    def _preview_poster(self, index: int) -> EmitPreview:
        def post(step: int, image: Image.Image) -> None:
            self._post(Preview(index, step, png(image), *image.size))

        return post

    def _take(self, event: Event | Exception) -> None:
        if isinstance(event, Progress):
            waits = event.phase is Phase.PREPARING
            (self._waiting.add if waits else self._waiting.discard)(event.image_index)
        self._news.put_nowait(event)


def shape_of(request: ImageRequest) -> Hashable:
    """What decides how much a picture computes at a gate: model, task, sizes, whether guidance doubles the batch."""
    guided = tuple((scale or 0.0) > 1.0 for scale in (request.guidance_scale, request.true_cfg_scale))
    references = tuple(image.size for image in request.reference_images)
    size = (request.width_px, request.height_px)
    return request.model, request.task, size, references, request.max_sequence_length, guided
