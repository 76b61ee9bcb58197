"""The command line as its users meet it: a process, its files, its two streams and its exit code."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from client_theatre import TAKES_INTERRUPTS, Headwater, ScriptedSampler, Stage, command, draw, info, png
from google.rpc import error_details_pb2
from headwater.sampler.v1 import sampler_pb2 as pb
from headwater_client.cli import main


def files(directory: Path) -> set[str]:
    """What is there besides the socket."""
    return {path.name for path in directory.iterdir()} - {"sampler.sock"}


def test_pictures_are_written_and_named(headwater: Headwater, sampler: ScriptedSampler, tmp_path: Path) -> None:
    """File names go to stdout, plain lines without control codes to stderr."""
    done = headwater("generate", "a fox", "-o", "out.png", "--seed", "7", "--count", "2", "--size", "48x32")

    assert (done.returncode, done.stdout) == (0, "out-0.png\nout-1.png\n")
    assert files(tmp_path) == {"out-0.png", "out-1.png"}
    assert (tmp_path / "out-1.png").read_bytes() == png(8)
    assert (sampler.requests[0].width_px, sampler.requests[0].height_px) == (48, 32)
    assert "queued, 2 before this one, about 12 s\n" in done.stderr
    assert "picture 1: preparing 1.0 GB of 12.3 GB\n" in done.stderr
    assert "picture 0: denoising 0/3\n" in done.stderr
    assert "picture 1: done 48x32 seed 8\n" in done.stderr
    assert "\x1b" not in done.stderr
    assert "\r" not in done.stderr


def test_json_is_one_document_and_nothing_else(headwater: Headwater, sampler: ScriptedSampler, tmp_path: Path) -> None:
    """Files, seeds, times, bytes and parameters; stderr stays empty."""
    done = headwater("generate", "a fox", "-o", "out.png", "--seed", "7", "--json")
    document = json.loads(done.stdout)

    assert done.stderr == ""
    assert document["files"] == ["out.png"]
    assert document["seeds"] == [7]
    assert document["images"][0]["size_bytes"] == (tmp_path / "out.png").stat().st_size
    assert (document["run_time_s"], document["streamed_bytes"]) == (1.5, 7_000_000)
    assert document["phase_times_s"] == {"denoising": 1.2}
    assert document["parameters"]["prompt"] == "a fox"


@pytest.mark.parametrize(("flag", "sent"), [("--tiled-decode", True), ("--no-tiled-decode", False), ("", None)])
def test_tiles_are_asked_for(flag: str, sent: bool | None, headwater: Headwater, sampler: ScriptedSampler) -> None:
    """On, off, or nothing said: the server's choice."""
    done = headwater("generate", "a fox", "--quiet", *filter(None, [flag]))

    assert done.returncode == 0
    request = sampler.requests[0]
    assert (request.tiled_decode if request.HasField("tiled_decode") else None) is sent


def test_a_solver_and_a_schedule_are_asked_for(headwater: Headwater, sampler: ScriptedSampler) -> None:
    """By their common names, as they were typed; nothing said is the model's own."""
    flags = ["--solver", "unipc", "--schedule", "beta"]
    done = [headwater("generate", "a fox", "--quiet", *more) for more in (flags, [])]

    assert [each.returncode for each in done] == [0, 0]
    assert [(each.solver, each.schedule) for each in sampler.requests] == [("unipc", "beta"), ("", "")]


@pytest.mark.parametrize(
    ("flags", "sent", "file"),
    [
        ([], (pb.IMAGE_FORMAT_PNG, None), "out.png"),
        (["-o", "fox.JPG", "--quality", "75"], (pb.IMAGE_FORMAT_JPEG, 75), "fox.JPG"),
        (["-o", "fox.webp"], (pb.IMAGE_FORMAT_WEBP, None), "fox.webp"),
        (["--format", "jpeg"], (pb.IMAGE_FORMAT_JPEG, None), "out.jpg"),
        (["--format", "jpeg", "-o", "fox.jpeg"], (pb.IMAGE_FORMAT_JPEG, None), "fox.jpeg"),
        (["--format", "webp", "-o", "fox"], (pb.IMAGE_FORMAT_WEBP, None), "fox"),
    ],
)
def test_an_encoding_is_asked_for(
    flags: list[str], sent: tuple[int, int | None], file: str, headwater: Headwater, sampler: ScriptedSampler
) -> None:
    """By the suffix or by --format, which also gives a name where there is none."""
    done = headwater("generate", "a fox", *flags)
    output = sampler.requests[0].output

    assert (done.returncode, done.stdout) == (0, f"{file}\n")
    assert (output.format, output.quality if output.HasField("quality") else None) == sent


def test_quiet_says_nothing(headwater: Headwater, sampler: ScriptedSampler) -> None:
    """Success is silent."""
    done = headwater("generate", "a fox", "--quiet")

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_previews_are_kept(headwater: Headwater, sampler: ScriptedSampler, tmp_path: Path) -> None:
    """They go where --save-preview says, named by picture and step."""
    (tmp_path / "steps").mkdir()
    done = headwater("generate", "a fox", "--save-preview", "steps", "--preview-every", "2", "--steps", "4", "--quiet")

    assert (done.returncode, done.stderr) == (0, "")
    assert files(tmp_path / "steps") == {"out-step-2.png", "out-step-4.png"}
    assert (tmp_path / "steps/out-step-4.png").read_bytes() == png(4, 24, 16)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "a", "-o", "gone/out.png"], "the directory gone does not exist"),
        (["generate", "a", "-o", "out.bmp"], "must end in .png"),
        (["generate", "a", "-o", "out"], "must end in .png"),
        (["generate", "a", "-o", "out.png", "--format", "webp"], "--format: is webp, but 'out.png' is a name for png"),
        (["generate", "a", "--format", "bmp"], "'bmp' is not one of"),
        (["generate", "a", "--size", "big"], "'big' is no size"),
        (["generate", "a", "--steps", "many"], "'many' is not a valid integer"),
        (["generate", "a", "--steps", "99999999999"], "steps: 99999999999 is"),
        (["generate", "a", "--preview-every", "2"], "--save-preview"),
        (["generate", "a", "--save-preview", "gone"], "the directory gone does not exist"),
        (["generate", "a", "--timeout", "0"], "timeout"),
        (["generate"], "Missing argument 'PROMPT'"),
        (["generate", "a", "--sise", "4"], "--sise"),
        (["paint"], "paint"),
        (["status", "--address", "nowhere"], "'nowhere' is no address"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(
    in_process: Path,
    sampler: ScriptedSampler,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    """Nothing is sent to the server, and nothing is written."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    stdout, stderr = capsys.readouterr()

    assert (caught.value.code, stdout) == (1, "")
    assert stderr.startswith("headwater: error: ")
    assert stderr.count("\n") == 1
    assert words in stderr
    assert sampler.requests == []
    assert files(in_process) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["--version"]])
def test_help_is_no_error(in_process: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    """It goes to stdout with exit code 0."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)

    assert caught.value.code == 0
    assert "headwater" in capsys.readouterr().out


def test_an_error_of_the_server_is_one_clean_line(
    headwater: Headwater, sampler: ScriptedSampler, tmp_path: Path
) -> None:
    """Line breaks and control codes of a message do not reach the terminal."""

    async def fail(stage: Stage) -> None:
        await stage.fail("NOT_FOUND", "no model\n'x' \x1b[31m; there are: demo", info("UNKNOWN_MODEL"))

    sampler.scripts = [fail]
    done = headwater("generate", "a fox", "--model", "x")

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "headwater: error: no model 'x'  [31m; there are: demo\n"
    assert files(tmp_path) == set()


def test_fields_that_the_server_refuses_are_named(headwater: Headwater, sampler: ScriptedSampler) -> None:
    """All of them, on one line."""
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="width_px", description="must be a multiple of 16")
    bad.field_violations.add(field="count", description="1 to 64")

    async def refuse(stage: Stage) -> None:
        await stage.fail("INVALID_ARGUMENT", "two fields", info("INVALID_REQUEST"), bad)

    sampler.scripts = [refuse]
    done = headwater("generate", "a fox", "--size", "17x16")

    assert done.returncode == 1
    assert done.stderr == "headwater: error: width_px: must be a multiple of 16; count: 1 to 64\n"


def test_nobody_listening_is_one_line(headwater: Headwater, address: str) -> None:
    """The address and the remedy, no traceback, no log line of gRPC."""
    done = headwater("status")

    assert done.returncode == 1
    assert done.stderr.startswith(f"headwater: error: nothing answers at {address}: start headwater-sampler")
    assert done.stderr.count("\n") == 1


def test_a_file_that_cannot_be_written_is_one_line(
    headwater: Headwater, sampler: ScriptedSampler, tmp_path: Path
) -> None:
    """The directory may vanish while the picture is drawn; no draft is left."""
    gone = tmp_path / "soon"
    gone.mkdir()

    async def remove_then_draw(stage: Stage) -> None:
        gone.rmdir()
        await draw(stage)

    sampler.scripts = [remove_then_draw]
    done = headwater("generate", "a fox", "-o", "soon/out.png", "--quiet")

    assert done.returncode == 1
    assert done.stderr.startswith("headwater: error: ")
    assert done.stderr.count("\n") == 1


def test_a_failing_request_keeps_whole_files_only(
    headwater: Headwater, sampler: ScriptedSampler, tmp_path: Path
) -> None:
    """The picture that was complete stays, the one that was not leaves nothing."""

    async def half(stage: Stage) -> None:
        await stage.started()
        await stage.picture(0, png(0))
        await stage.say(image_chunk={"image_index": 1, "data": png(1)[:500]})
        await stage.fail("INTERNAL", "it broke", info("INTERNAL"))

    sampler.scripts = [half]
    done = headwater("generate", "a fox", "--count", "2")

    assert done.returncode == 1
    assert done.stderr.endswith("headwater: error: it broke\n")
    assert files(tmp_path) == {"out-0.png"}


def test_ctrl_c_cancels_on_the_server(sampler: ScriptedSampler, environment: dict[str, str], tmp_path: Path) -> None:
    """SIGINT ends the process with 130 and the work with it."""

    async def hang(stage: Stage) -> None:
        await stage.started()
        await stage.hang()

    sampler.scripts = [hang]
    process = subprocess.Popen(
        [*TAKES_INTERRUPTS, *command("generate", "a fox")],
        env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert sampler.hanging.wait(60)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)

    assert process.returncode == 130
    assert sampler.cancelled.wait(60)
    assert stderr.endswith("headwater: cancelled\n")
    assert "Traceback" not in stderr
    assert files(tmp_path) == set()


def test_models_and_status_are_tables_or_json(headwater: Headwater, sampler: ScriptedSampler) -> None:
    """Text of the server stays text, whatever it looks like."""
    models, status = headwater("models"), headwater("status")
    documents: list[Any] = [json.loads(headwater(name, "--json").stdout) for name in ("models", "status")]

    assert models.stdout.splitlines()[0].split() == ["MODEL", "PIPELINE", "STATE", "READY", "SIZE", "ATTACHED", "TASKS"]
    assert "failed: no [bold] file" in models.stdout
    assert "replica-a (headwater 0.1.0)" in status.stdout
    assert [model["state"] for model in documents[0]] == ["failed", "ready"]
    assert documents[1]["attached_models"] == ["demo"]


def test_a_model_is_told_with_its_components(headwater: Headwater, sampler: ScriptedSampler) -> None:
    """And what of them is not in shared memory."""
    lines = headwater("model", "demo").stdout.splitlines()

    assert [line.split() for line in lines if "transformer" in line] == [
        ["transformer", ",", "5", "B", "in", "bfloat16,", "gates", "0"]
    ]
    assert lines[-1].split() == ["a", "copy", "of", "its", "own:", "norm:", "read-only"]


def test_prepare_tells_bytes(headwater: Headwater, sampler: ScriptedSampler) -> None:
    """Plain lines on stderr, or one document on stdout."""
    plain, document = headwater("prepare", "demo"), headwater("prepare", "--json")

    assert (plain.returncode, plain.stdout) == (0, "")
    assert plain.stderr.splitlines()[-1] == "demo: ready, 12.3 GB of 12.3 GB"
    assert json.loads(document.stdout)["done"] is True
    assert document.stderr == ""
