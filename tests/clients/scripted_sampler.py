"""A sampler that follows a script instead of a model: `python scripted_sampler.py UNIX_SOCKET`.

It listens on the socket and on a free TCP port, which it prints, and serves model "tiny": real PNG files in small
chunks after STEP_S a step. GetStatus counts what it is busy with, so a test sees that a cancel arrived. The prompts in
SCRIPTS make it do what a true sampler never does.
"""

import asyncio
import hashlib
import io
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from google.protobuf.duration_pb2 import Duration
from grpc_status import rpc_status
from headwater.sampler.v1 import sampler_pb2 as pb
from headwater.sampler.v1 import sampler_pb2_grpc
from PIL import Image

from services import errors
from services.rpc.status import status_from

ROOT = Path(__file__).resolve().parents[2]
STEP_S = 0.02
CHUNK_BYTES = 1000
SCRIPTS = ("queue", "damage", "shorten", "no finish")


class ScriptedSampler(sampler_pb2_grpc.SamplerServiceServicer):
    """Draws noise, keeps count."""

    def __init__(self) -> None:
        self._riding_count = 0
        self._image_count = 0

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        if (refusal := _refusal(request)) is not None:
            await context.abort_with_status(rpc_status.to_status(status_from(refusal)))
        self._riding_count += 1
        try:
            async for response in self._life(request):
                yield response
        finally:
            self._riding_count -= 1

    async def GetStatus(self, request: pb.GetStatusRequest, context: grpc.aio.ServicerContext) -> pb.GetStatusResponse:
        return pb.GetStatusResponse(riding_count=self._riding_count, image_count=self._image_count)

    async def _life(self, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        count, seed = request.count or 1, request.seed if request.HasField("seed") else 7
        if request.prompt == "queue":
            yield pb.GenerateResponse(queued=pb.Queued(position=1, estimate=Duration(seconds=2)))
        yield pb.GenerateResponse(started=pb.Started(replica="scripted", model="tiny", request_id="r"))
        for index in range(count):
            async for progress in _progress(request.step_count or 4):
                progress.image_index = index
                yield pb.GenerateResponse(progress=progress)
            for chunk in _chunks(request, index, seed + index):
                yield pb.GenerateResponse(image_chunk=chunk)
            self._image_count += 1
        if request.prompt != "no finish":
            finished = pb.Finished(
                seeds=range(seed, seed + count), streamed_bytes=3 << 20, run_time=Duration(seconds=1)
            )
            yield pb.GenerateResponse(finished=finished)


def _refusal(request: pb.GenerateRequest) -> errors.HeadwaterError | None:
    if request.model not in ("", "tiny"):
        return errors.UnknownModel(f"no model {request.model!r};\n  there is: tiny")
    violations = []
    if not request.prompt:
        violations.append(("prompt", "say what to draw"))
    if request.width_px % 16:
        violations.append(("width_px", "must be a multiple of 16"))
    return errors.InvalidRequest(*violations) if violations else None


async def _progress(step_count: int) -> AsyncIterator[pb.Progress]:
    yield pb.Progress(phase=pb.PHASE_PREPARING, ready_bytes=1 << 20, total_bytes=2 << 20)
    yield pb.Progress(phase=pb.PHASE_ENCODING)
    for step in range(step_count + 1):
        yield pb.Progress(phase=pb.PHASE_DENOISING, step=step, step_count=step_count)
        await asyncio.sleep(STEP_S)
    yield pb.Progress(phase=pb.PHASE_DECODING)


def _chunks(request: pb.GenerateRequest, index: int, seed: int) -> list[pb.ImageChunk]:
    size = (request.width_px or 64, request.height_px or 64)
    file = io.BytesIO()
    Image.effect_noise(size, 50 + seed % 50).save(file, "PNG")
    data = file.getvalue()
    last = pb.ImageSummary(
        size_bytes=len(data),
        sha256=hashlib.sha256(data).digest(),
        format=pb.IMAGE_FORMAT_PNG,
        width_px=size[0],
        height_px=size[1],
        seed=seed,
    )
    if request.prompt == "damage":
        data = data[:-1] + b"?"
    if request.prompt == "shorten":
        data = data[:-1]
    parts = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
    chunks = [pb.ImageChunk(image_index=index, data=part) for part in parts]
    chunks[-1].last.CopyFrom(last)
    return chunks


async def serve(socket_path: str) -> None:
    """Serve until the process is ended."""
    server = grpc.aio.server()
    sampler_pb2_grpc.add_SamplerServiceServicer_to_server(ScriptedSampler(), server)
    server.add_insecure_port(f"unix:{socket_path}")
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


@dataclass(frozen=True)
class Sampler:
    """A running scripted sampler and where it listens."""

    tcp: str
    unix: str
    process: subprocess.Popen[str]


@contextmanager
def running_sampler(folder: Path) -> Iterator[Sampler]:
    """A scripted sampler in a child process, its socket in `folder`; killed at the end."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "gen"), str(ROOT)])}
    command = [sys.executable, __file__, str(folder / "s.sock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port, "the scripted sampler did not start"
        yield Sampler(tcp=f"127.0.0.1:{port}", unix=f"unix:{folder / 's.sock'}", process=process)
        process.kill()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
