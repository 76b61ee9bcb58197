"""Deaths, slow fills, shared memory: what a replica does when the world around it changes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from headwater_client import (
    Client,
    HeadwaterError,
    Phase,
    Progress,
    Queued,
    Unavailable,
)

from services.errors import BadArena
from services.params.arena import attach
from services.sampler.__main__ import DEVICE_GONE_EXIT
from tests.sampler.support import draw, leased
from tests.stack import Stack, running


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
        assert outcome[0].code == "UNAVAILABLE", outcome
    assert draw(sampler.addresses[0]) == draw(own.sampler().addresses[0])


def test_model_replaced_while_its_loader_was_dead(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """The next loader reads changed files anew: who waited for the old fill is told, and the next request draws."""
    folder = Path(shutil.copytree(tiny_folders["tiny"], tmp_path / "tiny"))
    with running(tmp_path, {"tiny": folder}) as stack:
        loader = stack.loader("--max-fill-rate", "300KiB")
        sampler = stack.sampler()
        refused: list[HeadwaterError] = []

        def ask() -> None:
            with pytest.raises(Unavailable) as error:
                draw(sampler.addresses[0])
            refused.append(error.value)

        asking = threading.Thread(target=ask)
        asking.start()
        sampler.wait_for("event=attached")
        loader.kill()
        os.utime(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        stack.loader()
        asking.join(60)

        assert "anew" in refused[0].message
        assert draw(sampler.addresses[0])


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


def test_a_lost_device_ends_the_sampler(own: Stack) -> None:
    """Who rides and who waits hear UNAVAILABLE, health says NOT_SERVING, the exit code is for a supervisor."""
    own.loader("--eager-load")
    other = own.sampler()
    lost = own.sampler("--test-ring", "--riders", "2", module="tests.sampler.faulty_sampler")
    heard: list[Unavailable] = []

    def ask(under_way: threading.Event) -> None:
        try:
            with Client(lost.addresses[0]) as client:
                for event in client.stream("a red fox", model="tiny", steps=1000, count=2):
                    if isinstance(event, Queued) or (isinstance(event, Progress) and event.step):
                        under_way.set()
        except Unavailable as error:
            heard.append(error)

    under_way = [threading.Event() for _ in range(3)]
    callers = [threading.Thread(target=ask, args=(event,)) for event in under_way]
    with grpc.insecure_channel(lost.addresses[1]) as channel:
        service = health_pb2.HealthCheckRequest(service="headwater.sampler.v1.SamplerService")
        health = health_pb2_grpc.HealthStub(channel).Watch(service, timeout=60)
        assert next(health).status == health_pb2.HealthCheckResponse.SERVING
        for caller in callers:
            caller.start()
        assert all(event.wait(60) for event in under_way)
        os.kill(lost.pid, signal.SIGUSR1)
        states = [state.status for state in health]
        for caller in callers:
            caller.join(60)

    assert states == [health_pb2.HealthCheckResponse.NOT_SERVING]
    assert [error.reason for error in heard] == ["DEVICE_GONE"] * 3
    assert lost.popen.wait(60) == DEVICE_GONE_EXIT
    assert not Path(lost.addresses[0].removeprefix("unix:")).exists()
    assert "the device is lost" in lost.log.read_text()
    assert draw(other.addresses[0])


def test_arena_of_another_generation_is_refused(own: Stack) -> None:
    """What a sampler maps must be what the loader said."""
    own.loader("--eager-load").wait_for("serving")
    own.sampler()
    file = next(f for f in own.arena_dir.iterdir() if f.is_file() and f.name != "loader.lock")
    with pytest.raises(BadArena):
        attach(file, "0" * 32)
