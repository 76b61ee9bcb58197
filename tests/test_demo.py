"""The demo as people run it: it draws, says what it cost, and leaves nothing behind, whenever it is stopped."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path("/dev/shm")
DEMO_MODEL = ROOT / "models" / "demo" / "model_index.json"
MARK = "HEADWATER_TEST_DEMO"
INT, TERM = signal.SIGINT, signal.SIGTERM
# When somebody loses patience: Python starts, processes start, torch is imported, or whenever.
MOMENTS = [(INT, 0.05), (TERM, 0.1), (INT, 0.2), (TERM, 2.0), (INT, 4.0), (INT, None)]


@pytest.fixture(scope="module")
def model_flags(request: pytest.FixtureRequest) -> list[str]:
    """The committed model if there is one, else a tiny one with random weights."""
    if DEMO_MODEL.exists():
        return []
    return ["--model-folder", str(request.getfixturevalue("tiny_folders")["tiny"])]


class Demo:
    """A demo that was started in a session of its own, as a terminal would."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.output = folder / "demo.png"
        self.mark = f"{os.getpid()}-{time.monotonic_ns()}"
        self._text = folder / "demo.txt"
        command = ["env", "--block-signal=INT,TERM,HUP", sys.executable, str(ROOT / "scripts" / "demo")]
        with self._text.open("wb") as text:
            self.process = subprocess.Popen(
                [*command, "--output", str(self.output), *flags],
                env=os.environ | {MARK: self.mark},
                stdout=text,
                stderr=text,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self._text.read_text()

    def left_behind(self) -> list[str]:
        """Processes that the demo started, and its folders in shared memory."""
        processes = [f"{process.pid} {process.name()}" for process in marked(self.mark)]
        return processes + [path.name for path in SHARED.glob(f"headwater-demo-{self.process.pid}-*")]

    def wait_for(self, words: str) -> None:
        """Until the demo has said so."""
        deadline = time.monotonic() + 120
        while words not in self.text:
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        """What a terminal does: everybody in the foreground group gets it."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def stop(self, number: signal.Signals) -> int:
        """Send a signal; the exit code."""
        self.signal(number)
        return self.process.wait(60)

    def kill(self) -> None:
        for process in marked(self.mark):
            process.kill()


@contextmanager
def demo(folder: Path, *flags: str) -> Iterator[Demo]:
    running = Demo(folder, *flags)
    try:
        yield running
    finally:
        running.kill()


def marked(mark: str) -> list[psutil.Process]:
    """Processes that inherited a demo's environment, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.timeout(300)
def test_the_demo_draws_and_says_what_it_cost(tmp_path: Path, model_flags: list[str]) -> None:
    """A sheet of pictures that are not empty, and one copy of the weights for two samplers."""
    with demo(tmp_path, *model_flags, "--pictures", "4") as running:
        code = running.process.wait(240)

        assert code == 0, running.text
        assert running.left_behind() == []
        with Image.open(running.output) as sheet:
            assert sheet.width > 4 * 256
            assert all(low < high for low, high in sheet.convert("RGB").getextrema())
        for words in ("read from disk", "shared memory", "sampler b", "4 in ", "seconds in all"):
            assert words in running.text


@pytest.mark.parametrize(
    ("number", "after_s"), MOMENTS, ids=[f"{n.name}-{'random' if s is None else s}" for n, s in MOMENTS]
)
def test_a_stopped_demo_leaves_nothing(
    number: signal.Signals, after_s: float | None, tmp_path: Path, model_flags: list[str]
) -> None:
    """No process, no socket, no shared memory, no trace on the screen."""
    is_random = after_s is None
    after_s = random.uniform(0.3, 12) if after_s is None else after_s
    with demo(tmp_path, *model_flags) as running:
        time.sleep(after_s)
        was_over = running.process.poll() is not None
        code = running.stop(number)

        # A signal that comes before `env` has blocked it ends `env`, with nothing started yet.
        expected = {130, -number} if after_s < 0.15 else {130}
        assert code in expected or (is_random and was_over), f"after {after_s} s: {running.text}"
        assert "Traceback" not in running.text
        assert running.left_behind() == [], f"after {after_s} s"


@pytest.mark.parametrize("number", [INT, TERM], ids=["SIGINT", "SIGTERM"])
def test_a_demo_stopped_while_it_draws_leaves_nothing(
    number: signal.Signals, tmp_path: Path, model_flags: list[str]
) -> None:
    """Clients, samplers and the loader are all there, and all go."""
    with demo(tmp_path, *model_flags) as running:
        running.wait_for("  2 of 12")
        code = running.stop(number)

        assert code == 130, running.text
        assert "Traceback" not in running.text
        assert running.left_behind() == []
        assert not running.output.exists()


def test_impatience_is_understood(tmp_path: Path, model_flags: list[str]) -> None:
    """A second and a third Ctrl-C do not interrupt the tidying up."""
    with demo(tmp_path, *model_flags) as running:
        running.wait_for("healthy")
        for _ in range(3):
            running.signal(INT)
            time.sleep(0.05)
        code = running.stop(INT)

        assert code == 130, running.text
        assert "Traceback" not in running.text
        assert running.left_behind() == []


def test_a_wrong_folder_is_said_in_words(tmp_path: Path) -> None:
    """One line, exit code 1, and nothing left."""
    (tmp_path / "empty").mkdir()
    with demo(tmp_path, "--model-folder", str(tmp_path / "empty")) as running:
        code = running.process.wait(120)

        assert code == 1
        assert "model_index.json" in running.text
        assert "Traceback" not in running.text
        assert running.left_behind() == []
