"""What the bars say, without a terminal."""

import io

import pytest
from headwater_client import Image, ImageFormat, Phase, Progress, Queued, Started
from headwater_client.board import Board, size
from headwater_client.display import _render, clean
from rich.console import Console


class Clock:
    """Time that a test moves."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def step(index: int, done: int, count: int = 9) -> Progress:
    return Progress(index, Phase.DENOISING, done, count, None, 0, 0)


def image(index: int) -> Image:
    return Image(index, b"", "", ImageFormat.PNG, 1024, 688, 2**63 - 1)


def shown(board: Board, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(_render(board))
    return str(console.file.getvalue()).splitlines()  # type: ignore[attr-defined]


def test_the_pace_is_that_of_the_steps_seen() -> None:
    """The clock starts with the first denoising message, encoding does not count."""
    clock = Clock()
    board = Board(clock)
    board.add(Progress(0, Phase.ENCODING, 0, 0, None, 0, 0))
    clock.now_s = 100
    board.add(step(0, 0))
    assert board.rows[0].note == ""
    clock.now_s = 103
    board.add(step(0, 4))

    assert (board.rows[0].count, board.rows[0].note) == ("4/9", "0.75 s/step")


def test_phases_without_numbers_have_no_total() -> None:
    """They pulse; bytes and steps fill."""
    board = Board()
    totals = []
    for event in (
        Progress(0, Phase.PREPARING, 0, 0, None, 3, 12),
        Progress(0, Phase.ENCODING, 0, 0, None, 0, 0),
        step(0, 1),
        Progress(0, Phase.DECODING, 0, 0, None, 0, 0),
    ):
        board.add(event)
        totals.append(board.rows[0].total)

    assert totals == [12, None, 9, None]


def test_a_line_fits_80_columns() -> None:
    """Even with the largest seed; the bar gives way."""
    board = Board()
    board.add(Queued(3, 70.4))
    assert shown(board) == ["queued, 3 before this one, about 70 s"]
    board.add(Started("replica-a", "z-image", "r"))
    board.add(step(0, 5))
    board.add(image(1))
    lines = shown(board)

    assert lines[0] == "z-image on replica-a"
    assert all(len(line) <= 80 for line in lines)
    assert "━━━" in lines[2]
    assert lines[2].endswith("seed 9223372036854775807")


def test_many_pictures_show_those_that_are_drawn() -> None:
    """Finished ones are counted in the heading."""
    board = Board()
    board.add(Started("replica-a", "demo", "r"))
    for index in range(64):
        board.add(image(index) if index < 60 else step(index, 1))
    lines = shown(board)

    assert lines[0] == "demo on replica-a (60 of 64 pictures done)"
    assert [line.split()[1] for line in lines[1:]] == ["60", "61", "62", "63"]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (12_300_000, "12.3 MB"), (999_960, "1.0 MB"), (5e13, "50000.0 GB")]
)
def test_sizes_are_in_powers_of_1000(count: float, text: str) -> None:
    """With one digit after the point."""
    assert size(count) == text


def test_text_of_others_is_one_clean_line() -> None:
    """No control codes."""
    assert clean("a\n b\x1b[2J\x07") == "a b [2J "
