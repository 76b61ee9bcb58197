"""Cancels, deaths, slow fills, shared memory: what a replica does when the world around it changes."""

from __future__ import annotations

import itertools
import json
import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
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
    Unavailable,
)
from headwater_client.events import Event

from services.errors import BadArena
from services.params.arena import attach
from tests.sampler.support import served
from tests.stack import Process, Stack, running

ASK = ("tiny", "a red fox", (64, 64), 4, 7)


@pytest.fixture
def own(tiny_folders: dict[str, Path], tmp_path: Path) -> Iterator[Stack]:
    """A stack that a test may break, with the models "tiny" and "flux"."""
    with running(tmp_path, {name: tiny_folders[name] for name in ("tiny", "flux")}) as stack:
        yield stack


def draw(address: str, steps: int = 4, seed: int = 7) -> str:
    """SHA-256 of a picture of "tiny"."""
    with Client(address) as client:
        return client.generate("a red fox", model="tiny", steps=steps, seed=seed, timeout=90).images[0].sha256


def idle(address: str) -> None:
    """Wait until nobody rides or waits."""
    with Client(address) as client:
        for _ in range(400):
            status = client.status()
            if not status.riding_count and not status.queued_count:
                return
            time.sleep(0.02)
    raise AssertionError(f"still busy: {status}")


def leased(stack: Stack) -> bool:
    """Whether the kernel says that somebody maps an arena."""
    locks = Path("/proc/locks").read_text()
    inodes = {file.stat().st_ino for file in stack.arena_dir.iterdir() if file.is_file() and file.name != "loader.lock"}
    return any(int(match) in inodes for match in re.findall(r":(\d+) 0 EOF", locks))


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
    assert psutil.Process(sampler.pid).num_threads() <= threads + 1
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


def test_on_demand_starts_before_the_fill_ends(own: Stack) -> None:
    """With a fill of a few seconds, ENCODING or DENOISING is heard while extents are still missing."""
    own.loader("--max-fill-rate", "600KiB")
    address = own.sampler().addresses[0]
    ready_at_work: list[tuple[int, int]] = []
    with Client(address) as client, Client(address) as observer:
        kinds = []
        for event in client.stream("a red fox", model="tiny", steps=2, timeout=90):
            if isinstance(event, Progress):
                kinds.append(event.phase)
                if event.phase in (Phase.ENCODING, Phase.DENOISING):
                    model = next(m for m in observer.models() if m.name == "tiny")
                    ready_at_work.append((model.ready_bytes, model.size_bytes))
        digest = draw(address)

    assert Phase.PREPARING in kinds
    ready, size = ready_at_work[0]
    assert ready < size
    assert digest == draw(address)


def test_nothing_is_read_from_disk_during_generate(own: Stack) -> None:
    """After an eager load neither the loader nor a sampler reads a byte of the checkpoint to draw."""
    loader = own.loader("--eager-load")
    sampler = own.sampler()
    draw(sampler.addresses[0])
    before = {p.pid: psutil.Process(p.pid).io_counters() for p in (loader, sampler)}
    draw(sampler.addresses[0], seed=8)
    after = {p.pid: psutil.Process(p.pid).io_counters() for p in (loader, sampler)}

    for pid, io in before.items():
        assert after[pid].read_bytes == io.read_bytes  # from storage
        assert after[pid].read_chars - io.read_chars < 1 << 16  # by any read call; sockets included


def test_two_samplers_share_one_copy(own: Stack) -> None:
    """The proportional share of the arenas, summed over loader and samplers, is at most the arenas' size."""
    processes = [own.loader("--eager-load"), own.sampler(), own.sampler()]
    assert draw(processes[1].addresses[0]) == draw(processes[2].addresses[0])

    shares = [arena_pss_bytes(p.pid, own.arena_dir) for p in processes]
    size = sum(file.stat().st_size for file in own.arena_dir.iterdir() if file.is_file())
    assert shares[1] > 0
    assert shares[2] > 0
    assert sum(shares) <= size


def arena_pss_bytes(pid: int, arena_dir: Path) -> int:
    """Pss of a process's mappings of files under `arena_dir`."""
    total, counts = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counts = str(arena_dir) in line
        elif counts and line.startswith("Pss:"):
            total += int(line.split()[1]) << 10
    return total


def test_killed_sampler_leaves_the_others_alone(own: Stack) -> None:
    """A sampler dies by SIGKILL in mid-request: its lease goes, the other goes on, a new one attaches and serves."""
    own.loader("--eager-load")
    doomed, other = own.sampler(), own.sampler()
    digest = draw(other.addresses[0])
    with Client(doomed.addresses[0]) as client:
        events = client.stream("a red fox", model="tiny", steps=1000)
        next(e for e in events if isinstance(e, Progress) and e.step >= 2)
        doomed.kill()
        with pytest.raises(Unavailable):
            list(events)

    assert draw(other.addresses[0]) == digest
    assert draw(own.sampler().addresses[0]) == digest


def test_killed_loader_while_a_sampler_draws(own: Stack) -> None:
    """The loader dies by SIGKILL: the request ends well, the model is served on, a new loader takes over and serves."""
    loader = own.loader("--eager-load")
    sampler = own.sampler()
    address = sampler.addresses[0]
    digest = draw(address, steps=40)
    with Client(address) as client:
        events = client.stream("a red fox", model="tiny", steps=40, seed=7)
        next(e for e in events if isinstance(e, Progress) and e.step >= 2)
        loader.kill()
        images = [e for e in events if hasattr(e, "sha256")]
    assert [image.sha256 for image in images] == [digest]
    sampler.wait_for("loader gone")
    assert draw(address, steps=40) == digest
    with Client(address) as client, pytest.raises(Unavailable):
        client.generate("a red fox", model="flux")

    own.loader("--eager-load")
    sampler.wait_for("loader connected", count=2)
    assert draw(own.sampler().addresses[0], steps=40) == digest
    with Client(address) as client:
        assert client.generate("a red fox", model="flux", width=64, height=64, steps=2).images


def test_loader_killed_in_mid_fill(own: Stack) -> None:
    """Riders that wait for bytes of a dead loader's fill get them from the next loader."""
    loader = own.loader("--max-fill-rate", "300KiB")
    sampler = own.sampler()
    outcome: list[object] = []

    def ask() -> None:
        try:
            outcome.append(draw(sampler.addresses[0]))
        except HeadwaterError as error:
            outcome.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    sampler.wait_for("event=attached")
    time.sleep(1)
    loader.kill()
    own.loader()
    asking.join(90)

    if isinstance(outcome[0], HeadwaterError):  # the new loader had to start afresh: one clear error, then all is well
        assert outcome[0].code in ("UNAVAILABLE", "INTERNAL", "FAILED_PRECONDITION"), outcome
    assert draw(sampler.addresses[0]) == draw(own.sampler().addresses[0])


def test_sigterm_finishes_and_leaves_nothing(own: Stack) -> None:
    """SIGTERM lets a short request end, exits 0, and leaves no socket and no lease behind."""
    own.loader("--eager-load")
    sampler = own.sampler()
    digest = draw(sampler.addresses[0], steps=20)
    with Client(sampler.addresses[0]) as client:
        events = client.stream("a red fox", model="tiny", steps=20, seed=7)
        next(e for e in events if isinstance(e, Progress) and e.step >= 1)
        sampler.popen.terminate()
        images = [e for e in events if hasattr(e, "sha256")]

    assert sampler.popen.wait(30) == 0
    assert [image.sha256 for image in images] == [digest]
    assert not Path(sampler.addresses[0].removeprefix("unix:")).exists()
    assert not leased(own)


def test_leased_while_attached(own: Stack) -> None:
    """The probe that the tests above rely on sees a lease while a sampler maps the arena."""
    own.loader("--eager-load")
    sampler = own.sampler()
    draw(sampler.addresses[0])

    assert leased(own)


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


def test_a_sampler_may_start_before_the_loader(own: Stack) -> None:
    """Without a loader it is NOT_SERVING and says why; once there is one it serves, with nothing restarted."""
    sampler = own.sampler(until="event=serving")
    with grpc.insecure_channel(sampler.addresses[1]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        ask = health_pb2.HealthCheckRequest(service="headwater.sampler.v1.SamplerService")
        assert health.Check(ask).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with Client(sampler.addresses[0]) as client, pytest.raises(Unavailable, match="loader"):
            client.generate("a red fox", model="tiny")
        own.loader()
        sampler.wait_for("loader connected")
        assert draw(sampler.addresses[0])
        assert health.Check(ask).status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_names_the_service(sampler_tcp: str) -> None:
    """A generic client finds the service by asking."""
    with grpc.insecure_channel(sampler_tcp) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = next(iter(stub.ServerReflectionInfo(iter([ask]))))

    names = {service.name for service in answer.list_services_response.service}
    assert {"headwater.sampler.v1.SamplerService", "grpc.health.v1.Health"} <= names


def test_arena_of_another_generation_is_refused(own: Stack) -> None:
    """What a sampler maps must be what the loader said."""
    own.loader("--eager-load").wait_for("serving")
    own.sampler()
    file = next(f for f in own.arena_dir.iterdir() if f.is_file() and f.name != "loader.lock")
    with pytest.raises(BadArena):
        attach(file, "0" * 32)
