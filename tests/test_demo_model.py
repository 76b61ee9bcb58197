"""The demo model: its training world, the judge of its pictures, and the committed weights."""

import itertools
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from models.demo import check, draw

FOLDER = Path(draw.__file__).parent
LIMIT_BYTES = 20_000_000


def picture_of(scene: draw.Scene) -> Image.Image:
    """Draw a scene as the training does."""
    pixels = draw.render(torch.tensor([draw.pack(scene)]))[0]
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.fixture(scope="module")
def examples() -> list[tuple[str, Image.Image]]:
    """Captions and true pictures of them, of the trained and of the held-out scenes."""
    rng = random.Random(7)
    scenes = [draw.sample_scene(rng, held=i % 2 == 0) for i in range(100)]
    return [(draw.caption(scene, rng), picture_of(scene)) for scene in scenes]


def test_the_judge_finds_true_pictures_right(examples: list[tuple[str, Image.Image]]) -> None:
    """A picture drawn from a scene is right for every caption of that scene."""
    wrong = {prompt: faults for prompt, picture in examples if (faults := check.faults(picture, prompt))}

    assert wrong == {}


def test_the_judge_finds_other_pictures_wrong(examples: list[tuple[str, Image.Image]]) -> None:
    """A picture is wrong for the next scene's caption."""
    shifted = itertools.pairwise(examples)
    taken = [prompt for (prompt, _), (_, picture) in shifted if not check.faults(picture, prompt)]

    assert taken == []


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        ("a red circle on a white background", None),
        ("a blue circle on a white background", "red, not blue"),
        ("a red square on a white background", "circle, not square"),
        ("a red circle on a black background", "white background, not black"),
        ("a small red circle on a white background", "size 0.201, not small"),
        ("a red circle in the top left corner on a white background", "at center, not top left"),
        ("a red circle above a blue circle on a white background", "1 things, not 2"),
    ],
)
def test_the_judge_names_each_fault(prompt: str, fault: str | None) -> None:
    """One wrong word in the prompt is one fault, and says what was seen."""
    circle = draw.Thing("circle", "red", None, 0.5, 0.5, 0.2)
    picture = picture_of(draw.Scene("white", (circle,)))

    assert check.faults(picture, prompt) == ([fault] if fault else [])


def test_the_judge_refuses_what_it_cannot_read() -> None:
    """A prompt outside its words is an error, not a right picture."""
    with pytest.raises(ValueError, match="cannot judge"):
        check.read_prompt("an astronaut on a horse")


def test_training_never_draws_a_held_out_scene() -> None:
    """The sampler of training scenes keeps every held-out combination out, and the held-out prompts are all of them."""
    rng = random.Random(3)
    scenes = [draw.sample_scene(rng) for _ in range(3000)]

    assert not any(draw.held_out(scene) for scene in scenes)
    assert {(thing.shape, thing.colour) for scene in scenes for thing in scene.things}.isdisjoint(
        {("square", "purple"), ("circle", "black"), ("ring", "red")}
    )


def test_a_held_out_pair_is_held_out_however_it_is_said() -> None:
    """'a left of b' and 'b right of a' show one arrangement."""
    cross = draw.Thing("cross", "red", None, 0.26, 0.5, 0.14)
    others = [draw.Thing(shape, "green", None, 0.74, 0.5, 0.14) for shape in draw.SHAPES]
    there = [draw.held_out(draw.Scene("black", (cross, other), relation="left of")) for other in others]
    back = [draw.held_out(draw.Scene("black", (other, cross), relation="right of")) for other in others]

    assert there == back
    assert 0 < sum(there) < len(others)


def test_the_folder_is_small() -> None:
    """Cloning the repository must not cost more than a picture or two."""
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= LIMIT_BYTES


@pytest.mark.skipif(not (FOLDER / "model_index.json").exists(), reason="the weights are not trained yet")
def test_the_committed_model_draws_held_out_prompts() -> None:
    """diffusers' own pipeline, with the committed weights on a CPU, gets the first held-out prompts right."""
    results = check.measure(FOLDER, check.read_prompts("heldout")[:4])

    assert sum(not result.faults for result in results) >= 3
