"""Drawing with the blocking client and with the asyncio one: events, pictures, parameters, damage."""

import asyncio
import hashlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import pytest
from client_theatre import ScriptedSampler, Stage, Theatre, png
from headwater.sampler.v1 import sampler_pb2 as pb
from headwater_client import (
    AsyncClient,
    BrokenReply,
    Client,
    Finished,
    Image,
    ImageFormat,
    InvalidRequest,
    Numerics,
    Phase,
    Progress,
    Queued,
    Started,
)
from headwater_client.assembly import Assembly


def test_the_events_come_typed_and_in_order(client: Client) -> None:
    """Queued, Started, progress, Image and Finished arrive as they were sent, parts of pictures do not."""
    events = list(client.stream("a fox", seed=7, steps=2))

    assert events[:3] == [Queued(2, 12.0), Queued(0, None), Started("replica-a", "demo", events[2].request_id)]
    phases = [event.phase for event in events if isinstance(event, Progress)]
    assert phases == [Phase.PREPARING] * 2 + [Phase.ENCODING] + [Phase.DENOISING] * 3 + [Phase.DECODING]
    assert events[-3] == Progress(0, Phase.DECODING, 0, 0, None, 0, 0)
    assert [type(event) for event in events[-2:]] == [Image, Finished]


def test_chunks_become_the_very_file(client: Client) -> None:
    """Two pictures of several chunks each are put together, with seed, digest and size, and open in Pillow."""
    result = client.generate("a fox", seed=7, count=2)

    assert [image.data for image in result.images] == [png(7), png(8)]
    assert [image.seed for image in result.images] == [7, 8]
    assert result.images[1].sha256 == hashlib.sha256(png(8)).hexdigest()
    assert result.images[0].format is ImageFormat.PNG
    assert result.images[0].pil.size == (48, 32)


def test_finished_tells_cost_and_parameters(client: Client) -> None:
    """Times are seconds, and the parameters draw the same request again."""
    result = client.generate("a fox", seed=7, guidance_scale=0.0, preview_every=2, on_event=lambda event: None)
    again = client.generate(**result.finished.parameters)

    assert (result.finished.run_time_s, result.finished.queue_time_s, result.finished.stall_time_s) == (1.5, 0.25, 0)
    assert result.finished.phase_times_s == {Phase.DENOISING: 1.2}
    assert result.finished.numerics is Numerics.EAGER
    assert result.finished.parameters["guidance_scale"] == 0.0
    assert result.finished.parameters["preview_every"] == 2
    assert again.finished.parameters == result.finished.parameters


def test_every_option_reaches_its_field(client: Client, sampler: ScriptedSampler) -> None:
    """What is given arrives, what is not given is not sent."""
    options: dict[str, Any] = {
        "model": "demo",
        "negative_prompt": "fog",
        "width": 64,
        "height": 32,
        "steps": 4,
        "guidance_scale": 2.5,
        "true_cfg_scale": 1.5,
        "seed": 0,
        "count": 2,
        "request_id": "r-1",
        "max_sequence_length": 77,
        "preview_every": 2,
        "preview_edge": 32,
        "format": "webp",
        "quality": 80,
        "numerics": "compiled",
        "tiled_decode": False,
        "solver": "dpm++2m",
        "schedule": "karras",
        "rng": "gpu_philox",
    }
    client.generate("a fox", **options)
    client.generate("a fox", seed=None)

    request, bare = sampler.requests
    assert (request.width_px, request.step_count, request.seed, request.count) == (64, 4, 0, 2)
    assert (request.preview.every_step_count, request.preview.max_edge_px) == (2, 32)
    assert (request.output.format, request.output.quality, request.numerics) == (3, 80, 2)
    assert (request.request_id, request.max_sequence_length, request.true_cfg_scale) == ("r-1", 77, 1.5)
    assert request.HasField("tiled_decode")
    assert not request.tiled_decode
    assert (request.solver, request.schedule, request.rng) == ("dpm++2m", "karras", 2)
    assert {field.name for field, _ in bare.ListFields()} == {"prompt", "request_id"}


def test_values_that_no_request_can_hold_are_named_together(client: Client, sampler: ScriptedSampler) -> None:
    """Nothing is sent, and every bad option is in `violations`."""
    with pytest.raises(InvalidRequest) as caught:
        client.generate("a fox", width=2**40, steps="many", format="bmp", seed=1)  # type: ignore[arg-type]

    assert [field for field, _ in caught.value.violations] == ["width", "steps", "format"]
    assert "png, jpeg, webp" in caught.value.message
    assert sampler.requests == []


@pytest.mark.parametrize(
    ("summary", "words"),
    [({"sha256": b"x" * 32}, "SHA-256"), ({"size_bytes": 5}, "bytes, the server said 5")],
)
def test_a_damaged_picture_is_an_error(
    client: Client, sampler: ScriptedSampler, summary: dict[str, Any], words: str
) -> None:
    """A digest or size that does not match is BrokenReply, and no picture is handed out."""

    async def damaged(stage: Stage) -> None:
        await stage.started()
        await stage.picture(0, png(1), **summary)
        await stage.hang()

    sampler.scripts = [damaged]
    seen: list[object] = []
    with pytest.raises(BrokenReply, match=words):
        client.generate("a fox", on_event=seen.append)

    assert not any(isinstance(event, Image) for event in seen)
    assert sampler.cancelled.wait(5)


def test_a_picture_knows_how_long_its_parts_took() -> None:
    """From the first to the last, each picture by itself; equality looks at the picture alone."""
    times = iter([10.0, 13.0, 20.0, 20.0])
    assembly = Assembly(lambda: next(times))
    data = png(7)
    summary = pb.ImageSummary(size_bytes=len(data), sha256=hashlib.sha256(data).digest())
    images = []
    for parts in ([data[:9], data[9:99], data[99:]], [data]):
        chunks = [pb.ImageChunk(data=part) for part in parts]
        chunks[-1].last.CopyFrom(summary)
        images += [assembly.event(pb.GenerateResponse(image_chunk=chunk)) for chunk in chunks]
    first, second = (image for image in images if isinstance(image, Image))

    assert (first.transfer_s, second.transfer_s) == (3, 0)
    assert first == second


def test_a_story_without_an_end_is_an_error(client: Client, sampler: ScriptedSampler) -> None:
    """OK without Finished, and Finished without all pictures, are BrokenReply."""

    async def short(stage: Stage) -> None:
        await stage.finished([1])

    sampler.scripts = [Stage.started, short]

    with pytest.raises(BrokenReply, match="without Finished"):
        client.generate("a fox")
    with pytest.raises(BrokenReply, match="0 pictures came, the server said 1"):
        client.generate("a fox")


def test_asyncio_sees_the_same_as_blocking(theatre: Theatre, client: Client, address: str) -> None:
    """Both clients give equal events and equal results."""
    blocking = list(client.stream("a fox", seed=3, count=2, request_id="same"))
    blocking_result = client.generate("a fox", seed=3, request_id="same")

    async def other() -> tuple[list[Any], Any, Any]:
        async with AsyncClient(address) as asynchronous:
            options: dict[str, Any] = {"seed": 3, "request_id": "same"}
            async with aclosing(asynchronous.stream("a fox", count=2, **options)) as events:
                seen = [event async for event in events]
            both = await asyncio.gather(*(asynchronous.generate("a fox", **options) for _ in range(2)))
            return seen, *both

    seen, first, second = theatre.run(other())

    assert seen == blocking
    assert first == second == blocking_result


def test_models_status_and_preparation_are_typed(theatre: Theatre, client: Client, address: str) -> None:
    """The calls that draw nothing answer alike in both clients."""
    details = client.model("demo")

    async def other() -> tuple[Any, ...]:
        async with AsyncClient(address) as asynchronous:
            fills = [fill async for fill in asynchronous.prepare()]
            return await asynchronous.models(), await asynchronous.model(), fills, await asynchronous.status()

    models, same_details, fills, status = theatre.run(other())

    assert [model.state for model in models] == ["failed", "ready"]
    assert details == same_details
    assert (details.default_guidance_scale, details.components[0].outside) == (None, ("norm: read-only",))
    assert [fill.done for fill in fills] == [False, False, True]
    assert (models, fills, status) == (client.models(), list(client.prepare()), client.status())


def test_threads_share_a_client(client: Client) -> None:
    """Calls at the same time do not mix."""
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda seed: client.generate("a fox", seed=seed, count=2), range(16)))

    assert [[image.data for image in result.images] for result in results] == [
        [png(seed), png(seed + 1)] for seed in range(16)
    ]
