"""Requests as callers see them: events, previews, queue, cancel, deadline, refusals."""

from __future__ import annotations

import itertools
import json
import random
import re
import threading
import time
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from headwater_client import (
    Client,
    DeadlineExceeded,
    DuplicateRequest,
    HeadwaterError,
    MemoryFull,
    Phase,
    Preview,
    Progress,
    Queued,
    QueueFull,
    Started,
)
from headwater_client.events import Event

from tests.sampler.support import draw, idle, leased, served
from tests.stack import Process, Stack, running

ASK = ("tiny", "a red fox", (64, 64), 4, 7)


def test_events_of_a_request(sampler_unix: str) -> None:
    """Started first, phases in order, every step once, previews when asked for, Finished last."""
    with Client(sampler_unix) as client:
        events = list(client.stream("a red fox at sea", model="tiny", steps=4, preview_every=2))

    phases = [e.phase for e in events if isinstance(e, Progress)]
    steps = [e.step for e in events if isinstance(e, Progress) and e.phase is Phase.DENOISING]
    previews = [e for e in events if isinstance(e, Preview)]
    assert isinstance(events[0], Started)
    assert [p for p, _ in itertools.groupby(phases)][-3:] == [Phase.ENCODING, Phase.DENOISING, Phase.DECODING]
    assert sorted(set(steps)) == [0, 1, 2, 3, 4]
    assert [p.step for p in previews] == [2]
    assert max(previews[0].pil.size) <= 128
    sigmas = [e.sigma for e in events if isinstance(e, Progress) and e.sigma is not None]
    assert sigmas == sorted(sigmas, reverse=True)
    assert sigmas[-1] == 0


def test_previews_do_not_change_pictures(sampler_unix: str, ring_sampler: Process) -> None:
    """A preview after every step, in both engines, leaves the picture as it is without."""
    for model, address in itertools.product(("z_image", "flux", "qwen_image", "sdxl_f16"), ("views", "ring")):
        address = sampler_unix if address == "views" else ring_sampler.addresses[0]
        plain = served(address, model, *ASK[1:])
        watched = served(address, model, *ASK[1:], preview_every=1)
        assert plain.images[0].sha256 == watched.images[0].sha256, model


def test_fifty_cancels(own: Stack) -> None:
    """50 cancels at random moments leave no thread, nobody riding, the modules as before and the pictures right."""
    own.loader("--eager-load")
    sampler = own.sampler("--riders", "2", "--log-level", "debug")
    address = sampler.addresses[0]
    first = draw(address)
    idle(address)
    threads = psutil.Process(sampler.pid).num_threads()
    rng = random.Random(1)

    with Client(address) as client:
        for _ in range(50):
            events = client.stream("a blue bird", model="tiny", steps=8, seed=rng.randrange(1000), preview_every=3)
            for _event, _stop in zip(events, range(rng.randrange(12)), strict=False):
                pass
            events.close()

    idle(address)
    assert draw(address) == first
    idle(address)
    # Riders' threads wait to be used again, as many as rode at once.
    assert psutil.Process(sampler.pid).num_threads() <= threads + 2
    assert "changed shared modules" not in sampler.log.read_text()
    assert sampler.stop() == 0
    assert not leased(own)


def test_cancel_frees_the_seat_at_the_next_gate(own: Stack) -> None:
    """With one seat, a request behind a cancelled one of 1000 steps starts long before that would have ended."""
    own.loader("--eager-load")
    address = own.sampler("--riders", "1").addresses[0]
    with Client(address) as client, Client(address) as other:
        long = client.stream("a red fox", model="tiny", steps=1000)
        steps = 0
        for event in long:
            steps = event.step if isinstance(event, Progress) else steps
            if steps >= 2:
                break
        long.close()
        kinds = [type(e) for e in other.stream("a red fox", model="tiny", steps=2)]
        status = other.status()

    assert kinds[0] in (Queued, Started)
    assert status.image_count == 1
    assert status.riding_count == 0


def test_queue_positions_and_limit(own: Stack) -> None:
    """Who waits hears the position; who finds the queue full hears when to come back, and health stays SERVING."""
    own.loader("--eager-load")
    address = own.sampler("--riders", "1", "--queue", "1").addresses[0]
    heard: list[Event] = []
    with Client(address) as client, Client(address) as second, Client(address) as third:
        running_one = client.stream("a", model="tiny", steps=1000, request_id="one")
        next(e for e in running_one if isinstance(e, Progress))
        waiting = threading.Thread(target=lambda: heard.extend(second.stream("b", model="tiny", steps=2)))
        waiting.start()
        while third.status().queued_count < 1:
            time.sleep(0.02)
        with pytest.raises(QueueFull) as full:
            third.generate("c", model="tiny")
        with pytest.raises(DuplicateRequest):
            third.generate("d", model="tiny", request_id="one")
        running_one.close()
        waiting.join(60)

    assert full.value.retry_after_s >= 1
    assert isinstance(heard[0], Queued)
    assert heard[0].position == 0
    assert isinstance(heard[1], Started)


def test_deadline_ends_the_work(own: Stack) -> None:
    """A call that outlives its deadline ends with DEADLINE_EXCEEDED and rides no more."""
    own.loader("--eager-load")
    address = own.sampler().addresses[0]
    draw(address)
    with Client(address) as client, pytest.raises(DeadlineExceeded):
        client.generate("a red fox", model="tiny", steps=1000, timeout=0.5)
    idle(address)


def test_reflection_names_the_service(sampler_tcp: str) -> None:
    """A generic client finds the service by asking."""
    with grpc.insecure_channel(sampler_tcp) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = next(iter(stub.ServerReflectionInfo(iter([ask]))))

    names = {service.name for service in answer.list_services_response.service}
    assert {"headwater.sampler.v1.SamplerService", "grpc.health.v1.Health"} <= names


def test_a_model_that_does_not_fit_is_refused(own: Stack) -> None:
    """Too little host memory is RESOURCE_EXHAUSTED with numbers; nothing stays reserved, and the sampler serves on."""
    own.loader("--host-budget", "1500KiB")
    address = own.sampler().addresses[0]
    with Client(address) as client:
        with pytest.raises(MemoryFull, match="MiB"):
            client.generate("a red fox", model="tiny")
        left = [f.name for f in own.arena_dir.iterdir() if f.is_file() and f.name != "loader.lock"]
        small = client.generate("a red fox", model="flux", width=64, height=64, steps=2)

    assert left == []
    assert small.images


def test_broken_model_is_one_clear_error(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """Bad folders answer with what to do and no path; the good model beside them is served on."""
    import shutil

    bad = {name: Path(shutil.copytree(tiny_folders["tiny"], tmp_path / name)) for name in ("cut", "text", "wrong")}
    weights = bad["cut"] / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (bad["text"] / "vae" / "diffusion_pytorch_model.safetensors").write_text("<html>not found</html>")
    index = json.loads((bad["wrong"] / "model_index.json").read_text())
    (bad["wrong"] / "model_index.json").write_text(json.dumps(index | {"_class_name": "NoSuchPipeline"}))
    folder = tmp_path / "none"
    folder.mkdir()
    models = {**bad, "empty": folder, "tiny": tiny_folders["tiny"]}
    with running(tmp_path, models) as stack:
        stack.loader("--eager-load")
        address = stack.sampler().addresses[0]
        for name in (*bad, "empty"):
            with Client(address) as client, pytest.raises(HeadwaterError) as refused:
                client.generate("a red fox", model=name)
            assert refused.value.code == "FAILED_PRECONDITION", refused.value
            assert not re.search(r"(^|[^\w.])/", refused.value.message), refused.value  # files of the model only
        assert draw(address)
