"""What every command-line client does, whatever it is written in: one suite, run against each program.

A test module subclasses ClientBehaviour, marks itself `clients` and gives the fixture `program`: the command line to
which `generate ...` is added. Only `scripted_sampler` lies; the other fixtures may be a true sampler.
"""

import os
import pty
import re
import signal
import subprocess
import time
from pathlib import Path

import grpc
import pytest
from headwater.sampler.v1 import sampler_pb2, sampler_pb2_grpc
from PIL import Image

from tests.clients.scripted_sampler import Sampler

TIMEOUT_S = 60
# More steps than any test waits for.
LONG = ("--steps", "1000")


class ClientBehaviour:
    """Runs `program` as a user would."""

    @pytest.fixture
    def out(self, tmp_path: Path) -> Path:
        """Where the picture goes; alone in its folder, so leftovers show."""
        folder = tmp_path / "pictures"
        folder.mkdir()
        return folder / "out.png"

    @pytest.mark.parametrize("transport", ["sampler_tcp", "sampler_unix"])
    def test_draws_a_picture(
        self, program: list[str], transport: str, out: Path, request: pytest.FixtureRequest
    ) -> None:
        """A whole PNG of the asked size lies where it was asked for, and seed and cost are printed."""
        options = ("--model", "tiny", "--width", "64", "--height", "64", "--steps", "4", "--seed", "42")
        done = _generate(program, request.getfixturevalue(transport), out, *options)

        assert done.returncode == 0, done.stderr
        assert _size(out) == (64, 64)
        assert list(out.parent.iterdir()) == [out]
        assert "64x64, seed 42" in done.stdout
        assert re.search(r"ran \d+\.\d+ s.*streamed \d+\.\d+ MiB", done.stdout)

    def test_shows_progress(self, program: list[str], sampler_tcp: str, out: Path) -> None:
        """Standard error names the phases and counts every step."""
        done = _generate(program, sampler_tcp, out, "--steps", "4")

        steps = [f"picture 1/1: denoising, step {step}/4" for step in (1, 2, 3, 4)]
        assert [line for line in done.stderr.splitlines() if line in steps] == steps
        assert "picture 1/1: decoding" in done.stderr

    def test_rewrites_one_line_of_a_terminal(self, program: list[str], sampler_tcp: str, out: Path) -> None:
        """On a terminal the progress stays on one line and is gone at the end."""
        ours, theirs = pty.openpty()
        command = _command(program, sampler_tcp, out, "--steps", "4")
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=theirs, timeout=TIMEOUT_S, check=True)
        shown = os.read(ours, 1 << 16).decode()
        os.close(theirs)
        os.close(ours)

        assert "\r\x1b[Kpicture 1/1: denoising, step 4/4\r" in shown
        assert shown.endswith("\r\x1b[K")
        assert "\n" not in shown

    def test_shows_the_queue(self, program: list[str], scripted_sampler: Sampler, out: Path) -> None:
        """A request that waits says for how many others and about how long."""
        done = _generate(program, scripted_sampler.tcp, out, prompt="queue")

        assert "queued: 1 before this request, about 2.0 s" in done.stderr

    def test_numbers_several_pictures(self, program: list[str], sampler_tcp: str, out: Path) -> None:
        """Two pictures become two numbered files, with seeds that follow each other."""
        done = _generate(program, sampler_tcp, out, "--count", "2", "--seed", "5")

        assert done.returncode == 0, done.stderr
        assert sorted(path.name for path in out.parent.iterdir()) == ["out-0.png", "out-1.png"]
        assert "seed 5\n" in done.stdout
        assert "seed 6\n" in done.stdout

    def test_cancels_itself_after_steps(self, program: list[str], sampler_tcp: str, out: Path) -> None:
        """--cancel-after-steps exits 3, leaves no file, and the sampler stops working."""
        before = _status(sampler_tcp)
        done = _generate(program, sampler_tcp, out, *LONG, "--cancel-after-steps", "2")

        assert done.returncode == 3, done.stderr
        assert "step 2/1000" in done.stderr
        assert not list(out.parent.iterdir())
        _assert_stopped(sampler_tcp, before)

    def test_interrupt_cancels(self, program: list[str], sampler_tcp: str, out: Path) -> None:
        """Ctrl-C exits 130, leaves no file, and the sampler stops working."""
        before = _status(sampler_tcp)
        command = _command(program, sampler_tcp, out, *LONG)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
            _read_until(client, "step 2/1000")
            client.send_signal(signal.SIGINT)
            _, rest = client.communicate(timeout=TIMEOUT_S)

        assert client.returncode == 130, rest
        assert rest.splitlines()[-1].endswith(": interrupted")
        assert not list(out.parent.iterdir())
        _assert_stopped(sampler_tcp, before)

    def test_names_the_bad_field(self, program: list[str], sampler_tcp: str, out: Path) -> None:
        """An empty prompt is refused on one line with code, reason and field."""
        done = _generate(program, sampler_tcp, out, prompt="")

        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert "INVALID_ARGUMENT INVALID_REQUEST: prompt: " in done.stderr

    def test_unknown_model_is_one_line(self, program: list[str], sampler_tcp: str, out: Path) -> None:
        """A status without violations shows its message, on one line."""
        done = _generate(program, sampler_tcp, out, "--model", "no-such-model")

        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert "NOT_FOUND UNKNOWN_MODEL: " in done.stderr

    def test_timeout_ends_the_call(self, program: list[str], sampler_tcp: str, out: Path) -> None:
        """--timeout is the call's deadline: the sampler stops as for a cancel."""
        before = _status(sampler_tcp)
        done = _generate(program, sampler_tcp, out, *LONG, "--timeout", "0.3")

        assert done.returncode == 1
        assert "DEADLINE_EXCEEDED" in done.stderr.splitlines()[-1]
        _assert_stopped(sampler_tcp, before)

    def test_nobody_listens(self, program: list[str], tmp_path: Path, out: Path) -> None:
        """Without a sampler the client says UNAVAILABLE at once."""
        done = _generate(program, f"unix:{tmp_path}/none.sock", out)

        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert "UNAVAILABLE" in done.stderr

    def test_survives_a_dying_sampler(self, program: list[str], doomed_sampler: Sampler, out: Path) -> None:
        """A sampler that is killed while it draws is UNAVAILABLE, too."""
        command = _command(program, doomed_sampler.tcp, out, *LONG)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
            _read_until(client, "step 2/1000")
            doomed_sampler.process.kill()
            _, rest = client.communicate(timeout=TIMEOUT_S)

        assert client.returncode == 1
        assert "UNAVAILABLE" in rest.splitlines()[-1]
        assert not list(out.parent.iterdir())

    @pytest.mark.parametrize(
        ("prompt", "complaint"), [("damage", "SHA-256"), ("shorten", "bytes"), ("no finish", "last message")]
    )
    def test_refuses_a_damaged_picture(
        self, program: list[str], scripted_sampler: Sampler, out: Path, prompt: str, complaint: str
    ) -> None:
        """What does not match its announcement is never written."""
        done = _generate(program, scripted_sampler.tcp, out, prompt=prompt)

        assert done.returncode == 1
        assert complaint in done.stderr
        assert not list(out.parent.iterdir())

    def test_keeps_an_old_file_on_failure(self, program: list[str], sampler_tcp: str, out: Path) -> None:
        """A failed call leaves the file of an earlier one alone."""
        out.write_text("earlier")
        done = _generate(program, sampler_tcp, out, prompt="")

        assert done.returncode == 1
        assert out.read_text() == "earlier"

    def test_looks_at_the_output_folder_first(self, program: list[str], sampler_tcp: str, out: Path) -> None:
        """A folder that does not exist is noticed before a picture is drawn for it."""
        before = _status(sampler_tcp)
        done = _generate(program, sampler_tcp, out.parent / "none" / "out.png")

        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert "no such file or directory" in done.stderr.lower()
        assert _status(sampler_tcp).image_count == before.image_count

    @pytest.mark.parametrize("arguments", [[], ["generate"], ["generate", "--no-such-option"], ["paint"]])
    def test_wrong_usage(self, program: list[str], arguments: list[str]) -> None:
        """A wrong command line exits 2 and shows the right one."""
        done = subprocess.run([*program, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)

        assert done.returncode == 2
        assert "usage: " in done.stderr


def _command(program: list[str], address: str, out: Path, *options: str, prompt: str = "a lake") -> list[str]:
    return [*program, "generate", "--address", address, "--prompt", prompt, "-o", str(out), *options]


def _generate(
    program: list[str], address: str, out: Path, *options: str, prompt: str = "a lake"
) -> subprocess.CompletedProcess[str]:
    command = _command(program, address, out, *options, prompt=prompt)
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def _read_until(client: subprocess.Popen[str], text: str) -> None:
    assert client.stderr is not None
    assert any(text in line for line in client.stderr), f"{text!r} never came"


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


def _status(address: str) -> sampler_pb2.GetStatusResponse:
    with grpc.insecure_channel(address) as channel:
        return sampler_pb2_grpc.SamplerServiceStub(channel).GetStatus(sampler_pb2.GetStatusRequest(), timeout=TIMEOUT_S)


def _assert_stopped(address: str, before: sampler_pb2.GetStatusResponse) -> None:
    """Wait until nothing rides; had the work gone on to its end, a picture would have been counted."""
    deadline = time.monotonic() + TIMEOUT_S
    while (now := _status(address)).riding_count and time.monotonic() < deadline:
        time.sleep(0.02)
    assert now.riding_count == 0
    assert now.image_count == before.image_count
