"""Statuses become exceptions; some are tried again, until the request was started."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import headwater_client as hw
import pytest
from client_theatre import ScriptedSampler, Stage, Theatre, draw, info, retry_after
from google.rpc import error_details_pb2
from headwater_client import AsyncClient, Client

TABLE = [
    ("INVALID_ARGUMENT", "INVALID_REQUEST", hw.InvalidRequest),
    ("NOT_FOUND", "UNKNOWN_MODEL", hw.UnknownModel),
    ("ALREADY_EXISTS", "DUPLICATE_REQUEST", hw.DuplicateRequest),
    ("RESOURCE_EXHAUSTED", "QUEUE_FULL", hw.QueueFull),
    ("RESOURCE_EXHAUSTED", "HOST_MEMORY_FULL", hw.MemoryFull),
    ("RESOURCE_EXHAUSTED", "DEVICE_MEMORY_FULL", hw.MemoryFull),
    ("FAILED_PRECONDITION", "BAD_CHECKPOINT", hw.BadModel),
    ("FAILED_PRECONDITION", "UNSUPPORTED_MODEL", hw.BadModel),
    ("DATA_LOSS", "CHECKPOINT_CHANGED", hw.BadModel),
    ("UNIMPLEMENTED", "NOT_SERVED", hw.NotServed),
    ("UNAVAILABLE", "LOADER_GONE", hw.Unavailable),
    ("UNAVAILABLE", "DEVICE_GONE", hw.Unavailable),
    ("UNAVAILABLE", "SHUTTING_DOWN", hw.Unavailable),
    ("DEADLINE_EXCEEDED", "", hw.DeadlineExceeded),
    ("CANCELLED", "", hw.Cancelled),
    ("INTERNAL", "INTERNAL", hw.HeadwaterError),
    ("RESOURCE_EXHAUSTED", "", hw.HeadwaterError),
]


def failing(code: str, message: str, *details: Any) -> Callable[[Stage], Any]:
    """A script that only fails."""

    async def script(stage: Stage) -> None:
        await stage.fail(code, message, *details)

    return script


@pytest.mark.parametrize(("code", "reason", "kind"), TABLE, ids=[reason or code for code, reason, _ in TABLE])
def test_every_status_has_its_exception(
    theatre: Theatre, client: Client, sampler: ScriptedSampler, address: str, code: str, reason: str, kind: type
) -> None:
    """Type, code, reason and message are right in both clients."""
    details = [info(reason, model="x")] if reason else []
    sampler.scripts = [failing(code, "words", *details)]

    async def other() -> None:
        async with AsyncClient(address) as asynchronous:
            await asynchronous.generate("a fox")

    for call in (lambda: client.generate("a fox"), lambda: theatre.run(other())):
        with pytest.raises(hw.HeadwaterError) as caught:
            call()

        error = caught.value
        assert (type(error), error.code, error.reason, error.address) == (kind, code, reason, address)
        assert error.details == ({"model": "x"} if reason else {})
        assert code == "DEADLINE_EXCEEDED" or error.message == "words"


def test_all_violations_are_kept(client: Client, sampler: ScriptedSampler) -> None:
    """BadRequest becomes pairs of field and advice."""
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="width_px", description="must be a multiple of 16")
    bad.field_violations.add(field="count", description="1 to 64")
    sampler.scripts = [failing("INVALID_ARGUMENT", "two fields", info("INVALID_REQUEST"), bad)]

    with pytest.raises(hw.InvalidRequest) as caught:
        client.generate("a fox", width=17)

    assert caught.value.violations == (("width_px", "must be a multiple of 16"), ("count", "1 to 64"))


def test_nobody_listening_names_the_address_and_the_remedy(theatre: Theatre, tmp_path: Path) -> None:
    """A socket that nobody serves is told at once, and how to go on."""
    address = f"unix:{tmp_path}/nobody.sock"

    async def other() -> None:
        async with AsyncClient(address) as client:
            await client.status()

    with Client(address) as client:
        calls = (client.status, client.models, lambda: client.generate("a"), lambda: list(client.prepare()))
        for call in (*calls, lambda: theatre.run(other())):
            with pytest.raises(hw.Unreachable, match="start headwater-sampler") as caught:
                call()
            assert address in caught.value.message


@pytest.mark.parametrize("address", ["nowhere", "host:99999", "http://host:1", "unix:", "", "host:"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    """Nothing is connected."""
    with pytest.raises(hw.InvalidRequest, match="is no address"):
        Client(address)


def test_the_address_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """HEADWATER_ADDRESS may name several; without it there is a default."""
    monkeypatch.setenv("HEADWATER_ADDRESS", "unix:/a, [::1]:50051")
    several = AsyncClient().addresses
    monkeypatch.delenv("HEADWATER_ADDRESS")

    assert several == ("unix:/a", "[::1]:50051")
    assert AsyncClient().addresses == ("127.0.0.1:50051",)


def test_a_full_queue_is_tried_again_when_the_server_said(sampler: ScriptedSampler, address: str) -> None:
    """The same request is sent, not before RetryInfo's delay, and not more often than asked."""
    full = failing("RESOURCE_EXHAUSTED", "queue full", info("QUEUE_FULL"), retry_after(0.3))
    sampler.scripts = [full, full, draw]
    with Client(address, retries=2) as client:
        result = client.generate("a fox", seed=4)

    assert result.images[0].seed == 4
    assert len({request.request_id for request in sampler.requests}) == 1
    assert sampler.requests[0].request_id != ""
    gaps_s = [later - earlier for earlier, later in zip(sampler.times_s, sampler.times_s[1:], strict=False)]
    assert all(0.3 <= gap_s < 1.0 for gap_s in gaps_s)


def test_retries_are_bounded(sampler: ScriptedSampler, address: str) -> None:
    """The last error comes out, with its delay; without `retries` there is one attempt."""
    sampler.scripts = [failing("RESOURCE_EXHAUSTED", "queue full", info("QUEUE_FULL"), retry_after(0.05))]
    with Client(address, retries=2) as client, pytest.raises(hw.QueueFull) as caught:
        client.generate("a fox")
    assert len(sampler.requests) == 3
    assert caught.value.retry_after_s == 0.05

    with Client(address) as client, pytest.raises(hw.QueueFull):
        client.generate("a fox")
    assert len(sampler.requests) == 4


def test_no_retry_outlives_the_timeout(sampler: ScriptedSampler, address: str) -> None:
    """A pause that would pass the deadline is not begun."""
    sampler.scripts = [failing("RESOURCE_EXHAUSTED", "queue full", info("QUEUE_FULL"), retry_after(50))]
    with Client(address, retries=9) as client, pytest.raises(hw.QueueFull):
        client.generate("a fox", timeout=2)

    assert len(sampler.requests) == 1


def test_a_queued_request_is_tried_again_but_not_a_started_one(sampler: ScriptedSampler, address: str) -> None:
    """Until Started nothing was drawn; after it the caller decides."""

    async def drain_while_queued(stage: Stage) -> None:
        await stage.say(queued={"position": 1})
        await stage.fail("UNAVAILABLE", "draining", info("SHUTTING_DOWN"), retry_after(0.01))

    async def drain_while_drawing(stage: Stage) -> None:
        await stage.started()
        await stage.fail("UNAVAILABLE", "draining", info("SHUTTING_DOWN"), retry_after(0.01))

    sampler.scripts = [drain_while_queued, draw, drain_while_drawing, draw]
    with Client(address, retries=5) as client:
        result = client.generate("a fox")
        with pytest.raises(hw.Unavailable):
            client.generate("a fox")

    assert len(result.images) == 1
    assert len(sampler.requests) == 3


def test_other_errors_are_not_tried_again(sampler: ScriptedSampler, address: str) -> None:
    """What is wrong with a request stays wrong."""
    sampler.scripts = [failing("RESOURCE_EXHAUSTED", "too large", info("DEVICE_MEMORY_FULL"))]
    with Client(address, retries=5) as client, pytest.raises(hw.MemoryFull):
        client.generate("a fox")

    assert len(sampler.requests) == 1


def test_the_next_address_is_asked_at_once(sampler: ScriptedSampler, address: str, tmp_path: Path) -> None:
    """With one dead server of two every call succeeds, wherever it begins."""
    with Client([f"unix:{tmp_path}/dead.sock", address]) as client:
        seeds = [client.generate("a fox", seed=seed).images[0].seed for seed in range(4)]

    assert seeds == [0, 1, 2, 3]


def test_a_client_waits_for_a_server_that_starts(theatre: Theatre, address: str) -> None:
    """Retries bridge a restart."""
    servers: list[Any] = []
    timer = threading.Timer(0.5, lambda: servers.append(theatre.serve(ScriptedSampler(), address)[0]))
    timer.start()
    with Client(address, retries=6) as client:
        images = client.generate("a fox", timeout=15).images
    timer.join()
    theatre.stop(servers[0])

    assert len(images) == 1


def test_a_server_that_dies_is_told_apart_from_one_that_never_was(theatre: Theatre, address: str) -> None:
    """A broken connection is Unavailable with its own words."""
    sampler = ScriptedSampler()

    async def die(stage: Stage) -> None:
        await stage.started()
        await stage.fail("UNAVAILABLE", "Socket closed")

    sampler.scripts = [die]
    server, _ = theatre.serve(sampler, address)
    with Client(address, retries=3) as client, pytest.raises(hw.Unavailable, match="broke: Socket closed") as caught:
        client.generate("a fox")
    theatre.stop(server)

    assert type(caught.value) is hw.Unavailable
