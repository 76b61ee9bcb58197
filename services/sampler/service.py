"""SamplerService on the wire: messages to values, values to messages. Decides nothing."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from google.protobuf.duration_pb2 import Duration
from headwater.loader.v1 import loader_pb2
from headwater.sampler.v1 import sampler_pb2 as pb
from headwater.sampler.v1 import sampler_pb2_grpc

from services import __version__
from services.errors import LoaderGone, ShuttingDown
from services.rpc.loader_client import LoaderModel, PrepareNews
from services.sampler.device import DeviceFacts
from services.sampler.intake import Intake
from services.sampler.model import AttachedModel
from services.sampler.requests import (
    Event,
    Finished,
    ImageFormat,
    ImageRequest,
    Numerics,
    Phase,
    Picture,
    Preview,
    Progress,
    Queued,
    Rng,
    Started,
    Task,
)
from services.sampler.sampler import Sampler
from services.sampler.tasks import tasks_of_class
from services.sampler.validation import image_request

SERVICE = pb.DESCRIPTOR.services_by_name["SamplerService"].full_name
CHUNK_BYTES = 256 << 10
# The loader's enum and ours name the same states.
MODEL_STATES = {
    loader_pb2.ResidencyState.Value(f"RESIDENCY_STATE_{state}"): pb.ModelState.Value(f"MODEL_STATE_{state}")
    for state in ("UNSPECIFIED", "ABSENT", "FILLING", "READY", "FAILED")
}
NUMERICS = {numerics: pb.Numerics.Value(f"NUMERICS_{numerics.name}") for numerics in Numerics}
TASKS = {task: pb.Task.Value(f"TASK_{task.name}") for task in Task}
FORMATS = {each: pb.ImageFormat.Value(f"IMAGE_FORMAT_{each.name}") for each in ImageFormat}
PHASES = {phase: pb.Phase.Value(f"PHASE_{phase.name}") for phase in Phase}

RNGS = {rng: pb.Rng.Value(f"RNG_{rng.name}") for rng in Rng}


class SamplerService(sampler_pb2_grpc.SamplerServiceServicer):
    """Adapter of a Sampler. `drain` makes it refuse new work."""

    def __init__(self, sampler: Sampler, replica: str, device: DeviceFacts, numerics: Numerics) -> None:
        self._sampler = sampler
        self._replica = replica
        self._device = device
        self._numerics = numerics
        self._started = time.monotonic()
        self._draining = False
        self._intake = Intake()

    def drain(self) -> None:
        self._draining = True

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncGenerator[pb.GenerateResponse, None]:
        self._check_serving()
        asked = image_request(request, self._numerics)
        async with self._intake.filled(asked, request) as filled, aclosing(self._sampler.generate(filled)) as events:
            async for event in events:
                for response in self._responses(event):
                    yield response

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        attached = self._sampler.library.attached
        try:
            known = {model.name: model for model in await self._sampler.library.models()}
        except LoaderGone:
            if not attached:
                raise
            known = {}
        names = sorted(known.keys() | attached.keys())
        return pb.ListModelsResponse(models=[summary(n, attached.get(n), known.get(n)) for n in names])

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        self._check_serving()
        async with self._sampler.library.using(request.model) as model:
            abilities, traits = model.abilities, model.traits
            response = pb.GetModelResponse(
                summary=summary(model.name, model, None),
                numerics=NUMERICS[self._numerics],
                default_width_px=traits.width_px,
                default_height_px=traits.height_px,
                size_multiple_px=traits.size_multiple_px,
                default_step_count=traits.step_count,
                default_guidance_scale=traits.guidance_scale,
                request_fields=abilities.request_fields,
                solvers=list(traits.choices.solvers),
                default_solver=traits.choices.solver,
                schedules=traits.choices.schedule_names(),
                default_schedule=traits.choices.filled("", "")[1],
                tasks=[TASKS[task] for task in abilities.tasks],
                max_reference_image_count=abilities.reference_limit,
                default_strength=abilities.strength_of(Task.IMAGE_TO_IMAGE),
                default_inpaint_strength=abilities.strength_of(Task.INPAINT),
            )
            response.components.extend(component_summaries(model))
            return response

    async def PrepareModel(
        self, request: pb.PrepareModelRequest, context: Any
    ) -> AsyncGenerator[pb.PrepareModelResponse, None]:
        self._check_serving()
        name = await self._sampler.library.resolve(request.model)
        library = self._sampler.library
        async with aclosing(library.hint(name) if request.background else library.prepare(name)) as fill:
            async for news in fill:
                yield prepare_response(name, news)

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        sampler, transfer = self._sampler, self._sampler.engine.transfer
        return pb.GetStatusResponse(
            replica=self._replica,
            version=__version__,
            device=str(transfer.device),
            device_name=self._device.name,
            transfer=transfer.way,
            vram_budget_bytes=self._device.budget_bytes,
            vram_used_bytes=self._device.used_bytes(),
            riding_count=sampler.admission.riding_count,
            queued_count=sampler.admission.queued_count,
            queue_limit=sampler.admission.queue_limit,
            uptime=duration(time.monotonic() - self._started),
            image_count=sampler.image_count,
            streamed_bytes=transfer.streamed_bytes,
            attached_models=sorted(sampler.library.attached),
            loader_connected=sampler.library.loader_connected,
        )

    def _check_serving(self) -> None:
        if self._draining:
            raise ShuttingDown("this replica is shutting down: try another one")

    def _responses(self, event: Event) -> Iterator[pb.GenerateResponse]:
        match event:
            case Queued():
                estimate = None if event.estimate_s is None else duration(event.estimate_s)
                yield pb.GenerateResponse(queued=pb.Queued(position=event.position, estimate=estimate))
            case Started(request):
                started = pb.Started(replica=self._replica, model=request.model, request_id=request.request_id)
                yield pb.GenerateResponse(started=started)
            case Progress():
                yield pb.GenerateResponse(progress=progress(event))
            case Preview():
                yield pb.GenerateResponse(
                    preview=pb.Preview(
                        image_index=event.image_index,
                        step=event.step,
                        data=event.png,
                        width_px=event.width_px,
                        height_px=event.height_px,
                    )
                )
            case Picture():
                yield from chunks(event)
            case Finished():
                yield pb.GenerateResponse(finished=finished(event, self._numerics))


def progress(event: Progress) -> pb.Progress:
    return pb.Progress(
        image_index=event.image_index,
        phase=PHASES[event.phase],
        step=event.step,
        step_count=event.step_count,
        sigma=event.sigma,
        ready_bytes=event.ready_bytes,
        total_bytes=event.total_bytes,
    )


def chunks(picture: Picture) -> Iterator[pb.GenerateResponse]:
    """The picture's file in parts; what it adds up to goes with the last."""
    for start in range(0, len(picture.data), CHUNK_BYTES):
        chunk = pb.ImageChunk(image_index=picture.image_index, data=picture.data[start : start + CHUNK_BYTES])
        if start + CHUNK_BYTES >= len(picture.data):
            chunk.last.CopyFrom(
                pb.ImageSummary(
                    size_bytes=len(picture.data),
                    sha256=hashlib.sha256(picture.data).digest(),
                    format=FORMATS[picture.format],
                    width_px=picture.width_px,
                    height_px=picture.height_px,
                    seed=picture.seed,
                )
            )
        yield pb.GenerateResponse(image_chunk=chunk)


def finished(event: Finished, numerics: Numerics) -> pb.Finished:
    request = event.request
    return pb.Finished(
        seeds=[request.seed_of(index) for index in range(request.count)],
        queue_time=duration(event.queue_s),
        run_time=duration(event.run_s),
        stall_time=duration(event.stall_s),
        streamed_bytes=event.streamed_bytes,
        numerics=NUMERICS[numerics],
        parameters=parameters(request, numerics),
        phase_times=[pb.PhaseTime(phase=PHASES[p], time=duration(s)) for p, s in event.phase_s.items()],
    )


def parameters(request: ImageRequest, numerics: Numerics) -> pb.GenerateRequest:
    """The request as a message again, every default filled in."""
    message = pb.GenerateRequest(
        model=request.model,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width_px=request.width_px,
        height_px=request.height_px,
        step_count=request.step_count,
        guidance_scale=request.guidance_scale,
        true_cfg_scale=request.true_cfg_scale,
        seed=request.seed,
        count=request.count,
        request_id=request.request_id,
        max_sequence_length=request.max_sequence_length,
        output=pb.OutputOptions(format=FORMATS[request.format], quality=request.quality),
        numerics=NUMERICS[numerics],
        tiled_decode=request.tiled_decode,
        solver=request.solver,
        schedule=request.schedule,
        strength=request.strength,
        rng=RNGS[request.rng],
    )
    if request.preview_every:
        message.preview.every_step_count = request.preview_every
        message.preview.max_edge_px = request.preview_edge_px
    return message


def summary(name: str, attached: AttachedModel | None, known: LoaderModel | None) -> pb.ModelSummary:
    """A model as this sampler has it; as the loader knows it, if it is not attached."""
    if attached is not None:
        ready = attached.ready_bytes == attached.size_bytes
        return pb.ModelSummary(
            name=name,
            pipeline_class=type(attached.pipeline).__name__,
            state=pb.MODEL_STATE_READY if ready else pb.MODEL_STATE_FILLING,
            size_bytes=attached.size_bytes,
            ready_bytes=attached.ready_bytes,
            attached=True,
            tasks=[TASKS[task] for task in attached.abilities.tasks],
        )
    assert known is not None
    return pb.ModelSummary(
        name=name,
        pipeline_class=known.pipeline_class,
        state=MODEL_STATES[known.state],
        size_bytes=sum(c.size_bytes for c in known.components),
        ready_bytes=sum(c.ready_bytes for c in known.components),
        reason=known.reason,
        tasks=[TASKS[task] for task in tasks_of_class(known.pipeline_class)],
    )


def component_summaries(model: AttachedModel) -> Iterator[pb.ComponentSummary]:
    transfer = model.engine.transfer
    for component in model.components:
        gates = model.gates_of(component.name)
        yield pb.ComponentSummary(
            name=component.name,
            class_name=type(component.module).__name__,
            size_bytes=component.arena.size_bytes,
            outside_bytes=sum(o.size_bytes for o in component.outside),
            outside=[f"{o.name}, {o.size_bytes} bytes: {o.reason}" for o in component.outside],
            gate_count=len(gates),
            resident_bytes=sum(transfer.resident_bytes_of(gate) for gate in gates),
            dtype=str(component.dtype).removeprefix("torch."),
        )


def prepare_response(name: str, news: PrepareNews) -> pb.PrepareModelResponse:
    response = pb.PrepareModelResponse(
        model=name,
        total_bytes=news.total_bytes,
        ready_bytes=news.ready_bytes,
        rate_bytes_per_second=news.rate_bytes_per_second,
        done=news.done,
    )
    if news.HasField("eta"):
        response.eta.CopyFrom(news.eta)
    return response


def duration(seconds: float) -> Duration:
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message
