"""What a run asks and in which order: real calls to a scripted sampler."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from client_theatre import ScriptedSampler, Stage, Theatre, draw, info
from headwater_client import AsyncClient, InvalidRequest, Result
from headwater_client.run import Run
from headwater_client.workload import Workload, read_prompts


def drive(theatre: Theatre, address: str, workload: Workload, **callbacks: Any) -> Run:
    """A whole run."""

    async def whole() -> Run:
        run = Run(workload)
        async with AsyncClient(address) as client:
            await run.drive(client, **callbacks)
        return run

    return theatre.run(whole())


def asked(sampler: ScriptedSampler) -> list[tuple[str, int]]:
    return [(request.prompt, request.seed) for request in sampler.requests]


def test_prompts_are_lines(tmp_path: Path) -> None:
    """Blank lines and comments are none; a byte order mark is no text."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa fox\n\n  # a comment\n  a ring # in red \r\n#\n\t\n".encode())

    assert read_prompts(file) == ("a fox", "a ring # in red")


@pytest.mark.parametrize(
    ("data", "words"), [(b"", "has no prompt"), (b"# a\n\n", "has no prompt"), (b"a\xff", "byte 1")]
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    """With its name."""
    file = tmp_path / "prompts.txt"
    file.write_bytes(data)

    with pytest.raises(InvalidRequest, match=f"prompts.txt .*{words}"):
        read_prompts(file)


def test_prompts_are_taken_in_turn_and_seeds_count_up(theatre: Theatre, sampler: ScriptedSampler, address: str) -> None:
    """By the pictures of a request, so no seed comes twice."""
    workload = Workload(("a", "b"), request_count=3, seed=10, options={"count": 2, "steps": 1})
    run = drive(theatre, address, workload)

    assert asked(sampler) == [("a", 10), ("b", 12), ("a", 14)]
    assert run.complete
    assert (run.summary().image_count, run.summary().step_count) == (6, 6)


def test_a_seed_that_grows_too_large_is_refused_before_anything_is_sent() -> None:
    """The last request is looked at, too."""
    Workload(("a",), request_count=1, seed=2**63 - 1).check()
    with pytest.raises(InvalidRequest, match="seed"):
        Workload(("a",), request_count=2, seed=2**63 - 1).check()


def test_the_warm_up_comes_first_and_is_not_measured(theatre: Theatre, sampler: ScriptedSampler, address: str) -> None:
    """It is over before the first measured request is sent, and its failures are told apart."""

    async def fail(stage: Stage) -> None:
        await asyncio.sleep(0.1)
        await stage.fail("INTERNAL", "cold", info("INTERNAL"))

    sampler.scripts = [fail, draw]
    run = drive(theatre, address, Workload(("a",), request_count=3, client_count=3, warm_up_count=2))

    assert sorted(asked(sampler)[:2]) == [("a", 0), ("a", 1)]
    assert sorted(asked(sampler)[2:]) == [("a", 0), ("a", 1), ("a", 2)]
    assert (len(run.warm_up), len(run.samples)) == (2, 3)
    assert [(each.message, each.count) for each in run.warm_up_failures] == [("cold", 1)]
    assert (run.summary().failures, run.failed) == ((), True)


def test_as_many_requests_are_in_flight_as_there_are_clients(
    theatre: Theatre, sampler: ScriptedSampler, address: str
) -> None:
    """Three at once, never a fourth; the next is sent when one has ended."""
    flying: list[int] = []
    three = asyncio.Event()

    async def count(stage: Stage) -> None:
        flying.append(flying[-1] + 1 if flying else 1)
        if flying[-1] == 3:
            three.set()
        await three.wait()
        await draw(stage, 0.002)
        flying.append(flying[-1] - 1)

    sampler.scripts = [count]
    run = drive(theatre, address, Workload(("a",), request_count=8, client_count=3))

    assert max(flying) == 3
    assert run.summary().done_count == 8


def test_a_failed_request_stops_no_other(theatre: Theatre, sampler: ScriptedSampler, address: str) -> None:
    """The second of four is refused, one after that breaks off in the middle."""

    async def refuse(stage: Stage) -> None:
        await stage.fail("RESOURCE_EXHAUSTED", "64 wait", info("QUEUE_FULL"))

    async def break_off(stage: Stage) -> None:
        await stage.started()
        await stage.fail("INTERNAL", "it broke", info("INTERNAL"))

    sampler.scripts = [draw, refuse, break_off, draw]
    told: list[int] = []
    run = Run(Workload(("a",), request_count=4))

    async def whole() -> None:
        async with AsyncClient(address) as client:
            await run.drive(client, tell=lambda: told.append(len(run.samples)))

    theatre.run(whole())
    summary = run.summary()

    assert (summary.done_count, run.complete, run.failed) == (2, True, True)
    assert [(each.code, each.reason, each.count) for each in summary.failures] == [
        ("RESOURCE_EXHAUSTED", "QUEUE_FULL", 1),
        ("INTERNAL", "INTERNAL", 1),
    ]
    assert told == [1, 2, 3, 4]


def test_latencies_come_in_the_order_of_events(theatre: Theatre, sampler: ScriptedSampler, address: str) -> None:
    """Every mark is there, and none before the one before it."""
    times_s = drive(theatre, address, Workload(("a",), request_count=1)).samples[0].times_s

    assert 0 < times_s["started"] < times_s["progress"] < times_s["picture"] < times_s["whole"]


def test_cancelling_stops_what_is_in_flight_and_keeps_what_was_measured(
    theatre: Theatre, sampler: ScriptedSampler, address: str
) -> None:
    """Nothing more is sent; the summary tells of the done one."""

    async def hang(stage: Stage) -> None:
        await stage.started()
        await stage.hang()

    sampler.scripts = [draw, hang]
    run = Run(Workload(("a",), request_count=9, client_count=2))

    async def interrupted() -> None:
        one_done = asyncio.Event()
        async with AsyncClient(address) as client:
            task = asyncio.create_task(run.drive(client, tell=one_done.set))
            assert await asyncio.to_thread(sampler.hanging.wait, 5)
            await one_done.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(sampler.cancelled.wait, 5)

    theatre.run(interrupted())

    assert (run.complete, run.summary().done_count, run.failed) == (False, 1, False)
    assert len(sampler.requests) <= 3
    assert run.elapsed_s == run.elapsed_s > 0


def test_what_keep_raises_ends_the_run(theatre: Theatre, sampler: ScriptedSampler, address: str) -> None:
    """As itself, not in a group; it gets index and pictures of each done request."""
    kept = []

    async def keep(index: int, result: Result) -> None:
        kept.append((index, [image.seed for image in result.images]))
        if index == 1:
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        drive(theatre, address, Workload(("a",), request_count=9, seed=5), keep=keep)

    assert kept == [(0, [5]), (1, [6])]
