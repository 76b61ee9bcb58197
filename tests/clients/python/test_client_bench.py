"""`headwater bench` as its users meet it."""

import io
import json
import signal
import subprocess
from pathlib import Path

import pytest
from client_theatre import TAKES_INTERRUPTS, Headwater, ScriptedSampler, Stage, command, draw, info, png
from headwater_client import Unavailable
from headwater_client.cli import main
from headwater_client.gauge import render
from headwater_client.measures import Watch
from headwater_client.run import Run
from headwater_client.workload import Workload
from rich.console import Console

from tests.stack import Process


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """A file with two prompts."""
    file = tmp_path / "prompts.txt"
    file.write_text("# foxes\na fox\n\ntwo foxes\n")
    return str(file)


def test_the_table_tells_rates_latencies_and_costs(
    headwater: Headwater, sampler: ScriptedSampler, prompts: str
) -> None:
    """On stdout; plain lines of progress on stderr."""
    done = headwater("bench", prompts, "--clients", "2", "--requests", "5", "--seed", "7", "--warm-up", "2")
    rows = {line[:22].strip(): line[22:].strip() for line in done.stdout.splitlines()}

    assert done.returncode == 0, done.stderr
    assert rows["drawn"] == "demo, 48x32, 3 steps"
    assert rows["requests done"] == "5 of 5, 2 clients, 5 on replica-a"
    assert rows["warm-up"] == "2 before, not counted"
    assert rows["pictures"].startswith("5 in ")
    assert rows["mean run time"] == "1.500 s, by the server"
    assert rows["streamed per picture"] == "7.0 MB"
    assert done.stdout.splitlines()[-1].split()[:2] == ["whole", "request"]
    assert done.stderr.splitlines()[0].startswith("warm-up 1/2")
    assert done.stderr.splitlines()[-1].startswith("requests 5/5 ")
    assert sorted(request.seed for request in sampler.requests[2:]) == [7, 8, 9, 10, 11]


def test_json_is_one_document(headwater: Headwater, sampler: ScriptedSampler, prompts: str) -> None:
    """By default each prompt once, after one warm-up; nothing on stderr."""
    done = headwater("bench", prompts, "--json", "--count", "2", "--steps", "4", "--size", "48x32")
    document = json.loads(done.stdout)

    assert (done.returncode, done.stderr) == (0, "")
    assert (document["request_count"], document["done_count"], document["complete"]) == (2, 2, True)
    assert (document["image_count"], document["step_count"], document["failures"]) == (4, 16, [])
    assert document["warm_up"] == {"request_count": 1, "failures": []}
    assert document["streamed_bytes_per_image"] == 3_500_000
    assert set(document["latencies_s"]["whole"]) == {"p50_s", "p90_s", "p99_s", "max_s"}
    assert [request.seed for request in sampler.requests] == [0, 0, 2]


def test_a_failed_request_is_counted_by_code_and_exits_1(
    headwater: Headwater, sampler: ScriptedSampler, prompts: str
) -> None:
    """The others are drawn."""

    async def refuse(stage: Stage) -> None:
        await stage.fail("RESOURCE_EXHAUSTED", "64 requests wait", info("QUEUE_FULL"))

    sampler.scripts = [refuse, draw]
    done = headwater("bench", prompts, "--requests", "3", "--warm-up", "0", "--quiet")

    assert (done.returncode, done.stderr) == (1, "")
    assert "requests done         2 of 3, 1 client, 2 on replica-a\n" in done.stdout
    assert "requests failed       1, RESOURCE_EXHAUSTED QUEUE_FULL: 64 requests wait\n" in done.stdout


def test_nobody_listening_is_a_table_of_failures(headwater: Headwater, prompts: str) -> None:
    """Without figures, without a traceback."""
    done = headwater("bench", prompts)

    assert done.returncode == 1
    assert "requests done         0 of 2, 1 client\n" in done.stdout
    assert "requests failed       2, UNAVAILABLE: nothing answers at " in done.stdout
    assert "1 failed: nothing answers at" in done.stdout
    assert "Traceback" not in done.stderr


def test_pictures_are_kept(headwater: Headwater, sampler: ScriptedSampler, prompts: str, tmp_path: Path) -> None:
    """Named by request and seed; those of the warm-up are not."""
    (tmp_path / "out").mkdir()
    done = headwater("bench", prompts, "--seed", "7", "-o", "out", "--quiet")

    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000-seed-7.png", "00001-seed-8.png"]
    assert (tmp_path / "out/00001-seed-8.png").read_bytes() == png(8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["empty.txt"], "PROMPTS: empty.txt has no prompt"),
        (["gone.txt"], "gone.txt"),
        (["prompts.txt", "--clients", "0"], "--clients"),
        (["prompts.txt", "--requests", "0"], "--requests"),
        (["prompts.txt", "--size", "big"], "'big' is no size"),
        (["prompts.txt", "--seed", str(2**63 - 1)], "seed: 9223372036854775808 is"),
        (["prompts.txt", "-o", "gone"], "the directory gone does not exist"),
        (["prompts.txt", "--address", "nowhere"], "'nowhere' is no address"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(
    in_process: Path,
    prompts: str,
    sampler: ScriptedSampler,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    """Nothing is sent to the server, and there is no table."""
    (in_process / "empty.txt").write_text("# nothing\n")
    with pytest.raises(SystemExit) as caught:
        main(["bench", *arguments])
    stdout, stderr = capsys.readouterr()

    assert (caught.value.code, stdout) == (1, "")
    assert stderr.startswith("headwater: error: ")
    assert stderr.count("\n") == 1
    assert words in stderr
    assert sampler.requests == []


def test_ctrl_c_cancels_and_tells_what_was_measured(
    sampler: ScriptedSampler, environment: dict[str, str], prompts: str
) -> None:
    """One document, exit code 130, and the server is told."""

    async def hang(stage: Stage) -> None:
        await stage.started()
        await stage.hang()

    sampler.scripts = [draw, draw, hang]
    process = subprocess.Popen(
        [*TAKES_INTERRUPTS, *command("bench", prompts, "--requests", "50", "--json")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert sampler.hanging.wait(60)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    document = json.loads(stdout)

    assert process.returncode == 130
    assert (document["done_count"], document["complete"], document["failures"]) == (1, False, [])
    assert sampler.cancelled.wait(60)
    assert len(sampler.requests) == 3
    assert stderr.splitlines() == ["", "headwater: cancelled"]


def test_a_bar_fits_80_columns() -> None:
    """It names the warm-up, then counts requests and failures."""
    run = Run(Workload(("a",), request_count=200, warm_up_count=3))
    assert shown(run).split()[0] == "warm-up"
    run._began_s = 0
    run.samples += [Watch().stop(Unavailable("gone"))] * 37

    line = shown(run)
    assert len(line) <= 80
    assert line.split()[0] == "requests"
    assert "━━━" in line
    assert line.rstrip().endswith("37/200 37 failed")


def test_a_real_sampler_is_measured(tiny_sampler: Process, headwater: Headwater, prompts: str) -> None:
    """Steps and size come from the model's defaults, figures from the server."""
    address = tiny_sampler.addresses[0]
    done = headwater("bench", prompts, "--clients", "2", "--requests", "4", "--json", "--address", address)
    document = json.loads(done.stdout)

    assert done.returncode == 0, done.stderr
    assert (document["done_count"], document["image_count"]) == (4, 4)
    assert document["step_count"] == 4 * document["parameters"]["steps"] > 0
    assert document["parameters"]["model"] == "tiny"
    assert document["mean_run_time_s"] > 0
    spreads = document["latencies_s"]
    assert 0 < spreads["started"]["p50_s"] <= spreads["whole"]["p50_s"] <= spreads["whole"]["max_s"]


def shown(run: Run, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render(run))
    return str(console.file.getvalue()).splitlines()[0]  # type: ignore[attr-defined]
