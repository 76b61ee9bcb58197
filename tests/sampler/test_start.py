"""Models attached at start: served from the first moment on, or a start that ends with one line and serves nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from headwater_client import Client, HeadwaterError

from tests.sampler.support import draw
from tests.stack import ROOT, Stack, running

SERVICE = "headwater.sampler.v1.SamplerService"


@pytest.fixture(scope="module")
def models(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A loader with "tiny", "flux", and "strange", whose pipeline diffusers does not know."""
    disk = tmp_path_factory.mktemp("start")
    strange = Path(shutil.copytree(tiny_folders["tiny"], disk / "strange"))
    index = json.loads((strange / "model_index.json").read_text())
    (strange / "model_index.json").write_text(json.dumps(index | {"_class_name": "StrangePipeline"}))
    with running(disk, {"tiny": tiny_folders["tiny"], "flux": tiny_folders["flux"], "strange": strange}) as stack:
        stack.loader("--eager-load")
        yield stack


def refusal(stack: Stack, *flags: str) -> str:
    """What a sampler that ends at its start says beside its log: one line. Nothing was served, no socket is left."""
    socket = stack.memory / "refused.sock"
    command = [sys.executable, "-m", "services.sampler", "--loader", stack.loader_address, "--device", "cpu"]
    command += ["--listen", f"unix:{socket}", "--arena-dir", str(stack.arena_dir), *flags]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)

    assert ended.returncode == 1, ended.stderr
    assert "event=serving" not in ended.stderr
    assert not socket.exists()
    (line,) = (line for line in ended.stderr.splitlines() if not line.startswith("timestamp="))
    return line


def test_models_are_attached_before_anything_is_served(models: Stack) -> None:
    """Both are there when the log says "serving", and they draw."""
    sampler = models.sampler("--attach", "tiny", "--attach", "flux", until="event=serving")
    log = sampler.log.read_text()
    with Client(sampler.addresses[0]) as client:
        assert client.status().attached_models == ("flux", "tiny")

    assert log.index("event=attached model=tiny") < log.index("event=attached model=flux") < log.index("event=serving")
    assert draw(sampler.addresses[0])


def test_a_loader_that_comes_later_is_waited_for(own: Stack) -> None:
    """The log says so once; then all is as if the loader had been there, also once it has gone again."""
    sampler = own.sampler("--attach", "tiny", until="waiting for the loader")
    assert not sampler.addresses
    time.sleep(1.5)  # it asks every 0.5 s
    loader = own.loader("--eager-load")
    log = sampler.wait_for("event=serving")
    sampler.wait_for("all params ready")
    loader.kill()
    with grpc.insecure_channel(re.findall(r"127.0.0.1:\d+", log)[0]) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE))

    assert log.count("waiting for the loader") == 1
    assert health.status == health_pb2.HealthCheckResponse.SERVING


def test_sigterm_ends_the_wait_for_a_loader(own: Stack) -> None:
    """Exit code 0, and no socket is left."""
    sampler = own.sampler("--attach", "tiny", until="waiting for the loader")
    socket = next(own.memory.glob("sampler*.sock"))
    assert sampler.stop() == 0
    assert not socket.exists()
    assert "Traceback" not in sampler.log.read_text()


def test_a_model_that_is_not_known_ends_the_start(models: Stack) -> None:
    line = refusal(models, "--attach", "tiny", "--attach", "lost")
    assert line == "headwater-sampler: --attach lost: no model 'lost'; known: flux, strange, tiny"


def test_a_model_that_is_not_supported_ends_the_start(models: Stack) -> None:
    line = refusal(models, "--attach", "strange")
    assert line.startswith("headwater-sampler: --attach strange: ")
    assert "StrangePipeline" in line


@pytest.mark.parametrize(
    ("reserve", "small", "least"),
    [("0", "0.001", "0.01"), ("2", "2", "2.01")],
    ids=["no room for the gates", "none for a picture's work"],
)
def test_the_least_budget_is_named_and_works(models: Stack, reserve: str, small: str, least: str) -> None:
    """A budget that is too small ends the start; the one that is named serves a picture."""
    flags = ("--test-ring", "--gate-limit", "8192", "--work-reserve", reserve, "--attach", "tiny")
    line = refusal(models, *flags, "--max-vram", small)
    assert line.startswith("headwater-sampler: --attach tiny: the VRAM budget of ")
    assert re.findall(r"--max-vram ([0-9.]+) is the least that works", line) == [least]
    sampler = models.sampler(*flags, "--max-vram", least)

    assert draw(sampler.addresses[0])
    assert sampler.stop() == 0


def test_a_later_attach_names_the_least_budget_too(models: Stack) -> None:
    """Without --attach the first request hears it, and the replica goes on."""
    sampler = models.sampler("--test-ring", "--max-vram", "1")
    for _ in range(2):
        with Client(sampler.addresses[0]) as client, pytest.raises(HeadwaterError) as refused:
            client.generate("a red fox", model="tiny")

        assert "--max-vram 2.01 is the least that works" in refused.value.message
        assert refused.value.reason == "DEVICE_MEMORY_FULL"
