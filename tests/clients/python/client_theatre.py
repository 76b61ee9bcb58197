"""A sampler that plays scripts: a real grpc.aio server on a real socket, without a model behind it.

Each Generate call takes the next script, a coroutine over a Stage; the last one is played again and again.
"""

import asyncio
import hashlib
import io
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import grpc
import PIL.Image
from google.protobuf.any_pb2 import Any as Packed
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from headwater.sampler.v1 import sampler_pb2 as pb
from headwater.sampler.v1 import sampler_pb2_grpc

T = TypeVar("T")
Headwater = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).resolve().parents[3]
CHUNK_BYTES = 1000
CODES = {name: getattr(code_pb2, name) for name in code_pb2.Code.keys()}  # noqa: SIM118 - no mapping


def command(*arguments: str) -> list[str]:
    """The command line of the client, run from source."""
    return [sys.executable, "-m", "headwater_client.cli", *arguments]


# Before a command: SIGINT as in a terminal, also where the tests themselves run with it ignored (in the background).
# No `preexec_fn`, which can hang in a process whose gRPC threads run.
TAKES_INTERRUPTS = ("env", "--default-signal=INT")


def png(seed: int, width: int = 48, height: int = 32) -> bytes:
    """A real PNG file that differs for each seed and is longer than a chunk."""
    noise = hashlib.shake_256(str(seed).encode()).digest(width * height * 3)
    file = io.BytesIO()
    PIL.Image.frombytes("RGB", (width, height), noise).save(file, "PNG")
    return file.getvalue()


def failure(code: str, message: str, *details: Any) -> grpc.Status:
    """A status with details."""
    packed = []
    for detail in details:
        packed.append(Packed())
        packed[-1].Pack(detail)
    return rpc_status.to_status(status_pb2.Status(code=CODES[code], message=message, details=packed))


def info(reason: str, **metadata: str) -> error_details_pb2.ErrorInfo:
    """An ErrorInfo of our domain."""
    return error_details_pb2.ErrorInfo(reason=reason, domain="headwater", metadata=metadata)


def retry_after(seconds: float) -> error_details_pb2.RetryInfo:
    """A RetryInfo."""
    detail = error_details_pb2.RetryInfo()
    detail.retry_delay.FromMilliseconds(round(seconds * 1000))
    return detail


class Stage:
    """What a script may do to its call."""

    def __init__(self, request: pb.GenerateRequest, context: Any, sampler: "ScriptedSampler") -> None:
        self.request, self.sampler, self._context = request, sampler, context
        self._writing = asyncio.Lock()

    async def say(self, **event: Any) -> None:
        """Send one event."""
        async with self._writing:
            await self._context.write(pb.GenerateResponse(**event))

    async def fail(self, code: str, message: str, *details: Any) -> None:
        """End the call."""
        await self._context.abort_with_status(failure(code, message, *details))

    async def hang(self) -> None:
        """Wait for the client to go away."""
        self.sampler.hanging.set()
        await asyncio.Event().wait()

    async def started(self) -> None:
        """Admit the request."""
        request_id = self.request.request_id
        await self.say(started=pb.Started(replica="replica-a", model="demo", request_id=request_id))

    async def progress(self, index: int, phase: str, **fields: Any) -> None:
        """Tell where a picture is."""
        number = pb.Phase.Value(f"PHASE_{phase}")
        await self.say(progress=pb.Progress(image_index=index, phase=number, **fields))

    async def picture(self, index: int, data: bytes, **summary: Any) -> None:
        """Send a picture in chunks; `summary` overrides what is said of it."""
        said = {
            "size_bytes": len(data),
            "sha256": hashlib.sha256(data).digest(),
            "format": pb.IMAGE_FORMAT_PNG,
            "width_px": 48,
            "height_px": 32,
            "seed": self.request.seed + index,
            **summary,
        }
        parts = [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]
        for part in parts[:-1]:
            await self.say(image_chunk=pb.ImageChunk(image_index=index, data=part))
        last = pb.ImageChunk(image_index=index, data=parts[-1], last=pb.ImageSummary(**said))
        await self.say(image_chunk=last)

    async def finished(self, seeds: list[int]) -> None:
        """Tell what it cost."""
        used = pb.GenerateRequest()
        used.CopyFrom(self.request)
        used.model, used.width_px, used.height_px, used.step_count = "demo", 48, 32, used.step_count or 3
        used.output.format, used.numerics = pb.IMAGE_FORMAT_PNG, pb.NUMERICS_EAGER
        message = pb.Finished(seeds=seeds, streamed_bytes=7_000_000, numerics=pb.NUMERICS_EAGER, parameters=used)
        message.run_time.FromMilliseconds(1500)
        message.queue_time.FromMilliseconds(250)
        message.phase_times.add(phase=pb.PHASE_DENOISING).time.FromMilliseconds(1200)
        await self.say(finished=message)


async def draw(stage: Stage, pause_s: float = 0) -> None:
    """The whole life of a request, all goes well."""
    steps, count = stage.request.step_count or 3, stage.request.count or 1
    queued = pb.Queued(position=2)
    queued.estimate.FromSeconds(12)
    await stage.say(queued=queued)
    await stage.say(queued=pb.Queued(position=0))
    await asyncio.sleep(pause_s)
    await stage.started()
    for index in range(count):
        await _draw_one(stage, index, steps, pause_s)
    await stage.finished([stage.request.seed + index for index in range(count)])


async def _draw_one(stage: Stage, index: int, steps: int, pause_s: float) -> None:
    for ready in (1_000_000_000, 12_300_000_000):
        await stage.progress(index, "PREPARING", ready_bytes=ready, total_bytes=12_300_000_000)
        await asyncio.sleep(pause_s)
    await stage.progress(index, "ENCODING")
    await asyncio.sleep(pause_s)
    every = stage.request.preview.every_step_count
    for step in range(steps + 1):
        await stage.progress(index, "DENOISING", step=step, step_count=steps, sigma=1 - step / steps)
        if every and step and step % every == 0:
            small = pb.Preview(image_index=index, step=step, data=png(step, 24, 16), width_px=24, height_px=16)
            await stage.say(preview=small)
        await asyncio.sleep(pause_s)
    await stage.progress(index, "DECODING")
    await asyncio.sleep(pause_s)
    await stage.picture(index, png(stage.request.seed + index))


Script = Callable[[Stage], Awaitable[None]]


class ScriptedSampler(sampler_pb2_grpc.SamplerServiceServicer):
    """The service; remembers what it was asked. `cancelled` is set when a call was cut off.

    A mute one never answers GetStatus.
    """

    def __init__(self) -> None:
        self.scripts: list[Script] = [draw]
        self.requests: list[pb.GenerateRequest] = []
        self.times_s: list[float] = []
        self.hanging, self.cancelled = threading.Event(), threading.Event()
        self.mute = False

    async def Generate(self, request: Any, context: Any) -> None:
        """Play the next script."""
        self.requests.append(request)
        self.times_s.append(time.monotonic())
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        try:
            await script(Stage(request, context, self))
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def ListModels(self, request: Any, context: Any) -> Any:
        """Two models, one of them broken."""
        broken = pb.ModelSummary(name="broken", state=pb.MODEL_STATE_FAILED, reason="no [bold] file")
        return pb.ListModelsResponse(models=[broken, self.demo()])

    async def GetModel(self, request: Any, context: Any) -> Any:
        """The demo model, or NOT_FOUND."""
        if request.model not in ("", "demo"):
            message = f"no model {request.model!r}; there are: broken, demo"
            await context.abort_with_status(failure("NOT_FOUND", message, info("UNKNOWN_MODEL", model=request.model)))
        parts = [pb.ComponentSummary(name="transformer", size_bytes=5, outside=["norm: read-only"], dtype="bfloat16")]
        return pb.GetModelResponse(
            summary=self.demo(),
            numerics=pb.NUMERICS_EAGER,
            default_width_px=64,
            request_fields=["prompt", "seed"],
            components=parts,
        )

    async def PrepareModel(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Three messages."""
        for ready in (0, 6_000_000_000, 12_300_000_000):
            done = ready == 12_300_000_000
            yield pb.PrepareModelResponse(
                model=request.model or "demo",
                ready_bytes=ready,
                total_bytes=12_300_000_000,
                rate_bytes_per_second=2_000_000_000,
                done=done,
            )

    async def GetStatus(self, request: Any, context: Any) -> Any:
        """A quiet moment."""
        if self.mute:
            self.hanging.set()
            await asyncio.Event().wait()
        return pb.GetStatusResponse(
            replica="replica-a", version="0.1.0", device="cpu", queue_limit=64, attached_models=["demo"]
        )

    def demo(self) -> pb.ModelSummary:
        """The demo model."""
        state = pb.MODEL_STATE_READY
        return pb.ModelSummary(name="demo", pipeline_class="ZImagePipeline", state=state, size_bytes=5, ready_bytes=5)


class Theatre:
    """A loop in a thread with scripted servers on it. Asyncio tests run there too: one loop for all of grpc.aio."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="theatre")
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine on the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=30)

    def serve(self, sampler: ScriptedSampler, address: str) -> tuple[grpc.aio.Server, str]:
        """Serve at an address; gives the server and where it listens, if port 0 was asked."""

        async def start() -> tuple[grpc.aio.Server, str]:
            server = grpc.aio.server()
            sampler_pb2_grpc.add_SamplerServiceServicer_to_server(sampler, server)
            port = server.add_insecure_port(address)
            await server.start()
            return server, address if address.startswith("unix:") else f"127.0.0.1:{port}"

        return self.run(start())

    def stop(self, server: grpc.aio.Server) -> None:
        """Stop a server at once."""
        self.run(server.stop(None))

    def close(self) -> None:
        """End the loop."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()
