"""Scenes of one or two flat shapes: what they hold, how they are said, and how they look.

This file owns the demo model's world: the words, the hold-outs, the captions and the pictures.
It knows nothing of the model, and check.py knows nothing of it.
"""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import torch

SIDE = 128  # pixels; lengths in a scene are fractions of it

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "yellow": (250, 215, 40),
    "green": (40, 160, 75),
    "blue": (40, 90, 220),
    "purple": (130, 60, 180),
    "pink": (250, 130, 190),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")

# Half the longest extent. Things that share a picture are smaller, so that two large ones do not touch.
RADII_ALONE = {"small": 0.12, "medium": 0.2, "large": 0.30}
RADII_SHARED = {"small": 0.10, "medium": 0.15, "large": 0.20}

# place -> (column, row): -1 left or top, 0 the middle, 1 right or bottom.
PLACES: dict[str, tuple[int, int]] = {
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
    "top": (0, -1),
    "bottom": (0, 1),
    "left": (-1, 0),
    "right": (1, 0),
    "center": (0, 0),
}
# relation -> (column, row) of the thing named first; "and" leaves the arrangement open.
RELATIONS: dict[str, tuple[int, int] | None] = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
    "and": None,
}

# How a scene is said. A phrase that stands twice is said twice as often.
SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
CORNER_PHRASES = ("in the {} corner", "in the {} corner", "in the {}", "at the {}")
SIDE_PHRASES = {
    "top": ("at the top", "at the top", "near the top"),
    "bottom": ("at the bottom", "at the bottom", "near the bottom"),
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "center": ("in the center", "in the middle", "in the centre"),
}
RELATION_PHRASES = {
    "left of": ("left of", "left of", "to the left of", "on the left of"),
    "right of": ("right of", "right of", "to the right of", "on the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under", "beneath"),
    "and": ("and", "and", "next to", "with"),
}
BACKGROUND_PHRASES = (
    (" on {a} {c} background", 7),
    (" on {c}", 1),
    (" against {a} {c} background", 1),
    (", {c} background", 1),
)
LEADS = (("", 7), ("a picture of ", 1), ("a drawing of ", 1), ("an image of ", 1))

THING_FIELDS = 7  # shape, x, y, radius, r, g, b
SCENE_FIELDS = 3 + 2 * THING_FIELDS


@dataclass(frozen=True)
class Thing:
    """One shape. x, y and radius are fractions of the side; size is None where the caption leaves it out."""

    shape: str
    colour: str
    size: str | None
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One picture: one thing, perhaps at a named place, or two things in a relation."""

    background: str
    things: tuple[Thing, ...]
    place: str | None = None
    relation: str | None = None


def held_out(scene: Scene) -> bool:
    """Say whether training must never see this scene.

    Held out are one colour for each shape (a blue square, a yellow heart, ...), and a sixth of the ordered
    pairs of shapes side by side or one above the other, however a caption would put it.
    """
    return any(_unseen_colour(thing) for thing in scene.things) or _unseen_pair(scene.things)


def _unseen_colour(thing: Thing) -> bool:
    return (list(COLOURS).index(thing.colour) + 3 * SHAPES.index(thing.shape)) % len(COLOURS) == 7


def _unseen_pair(things: tuple[Thing, ...]) -> bool:
    """Judge by where the things are: 'a left of b' and 'b right of a' are one arrangement."""
    if len(things) < 2:
        return False
    first, second = things
    vertical = abs(first.y - second.y) > abs(first.x - second.x)
    if (first.y > second.y) if vertical else (first.x > second.x):
        first, second = second, first
    return (SHAPES.index(first.shape) + 3 * SHAPES.index(second.shape) + 5 * vertical) % len(SHAPES) == 4


def sample_scene(rng: random.Random, held: bool = False) -> Scene:
    """Draw a random scene, from the held-out ones or from all the others."""
    while True:
        scene = _sample_pair(rng) if rng.random() < 0.55 else _sample_single(rng)
        if held_out(scene) == held:
            return scene


def _sample_look(rng: random.Random, background: str) -> tuple[str, str, str | None]:
    """Return shape, colour and size; a thing never has its background's colour."""
    colour = rng.choice([name for name in COLOURS if name != background])
    return rng.choice(SHAPES), colour, rng.choice((None, None, "small", "large"))


def _sample_single(rng: random.Random) -> Scene:
    background = rng.choice(list(COLOURS))
    shape, colour, size = _sample_look(rng, background)
    radius = RADII_ALONE[size or "medium"] * rng.uniform(0.96, 1.04)
    place = rng.choice((None, *PLACES))
    spread = 0.08 if place is None else 0.03  # said or not, the middle is the default place
    x, y = (_coordinate(rng, side, radius, spread) for side in PLACES[place or "center"])
    return Scene(background, (Thing(shape, colour, size, x, y, radius),), place=place)


def _coordinate(rng: random.Random, side: int, radius: float, spread: float) -> float:
    """Return a centre around the middle (side 0), or one that leaves a narrow margin to that side."""
    if side == 0:
        return 0.5 + rng.uniform(-spread, spread)
    inset = radius + rng.uniform(0.03, 0.07)
    return inset if side < 0 else 1 - inset


def _sample_pair(rng: random.Random) -> Scene:
    background = rng.choice(list(COLOURS))
    relation = rng.choice(("left of", "right of", "above", "below") * 2 + ("and",))
    column, row = RELATIONS[relation] or rng.choice(((-1, 0), (1, 0), (0, -1), (0, 1)))
    things = []
    for sign in (1, -1):
        shape, colour, size = _sample_look(rng, background)
        radius = RADII_SHARED[size or "medium"] * rng.uniform(0.96, 1.04)
        x, y = (0.5 + 0.24 * sign * side + rng.uniform(-1, 1) * (0.02 if side else 0.05) for side in (column, row))
        things.append(Thing(shape, colour, size, x, y, radius))
    return Scene(background, tuple(things), relation=relation)


def caption(scene: Scene, rng: random.Random) -> str:
    """Put a scene into words, in one of several phrasings; every word said is true of the scene."""
    noun_phrases = [_name_thing(thing, rng) for thing in scene.things]
    if scene.relation:
        text = f" {rng.choice(RELATION_PHRASES[scene.relation])} ".join(noun_phrases)
    else:
        text = noun_phrases[0] + _name_place(scene.place, rng)
    text = _weighted(LEADS, rng) + text
    if scene.background == "white" and rng.random() < 0.1:
        return text  # white is what an unsaid background means
    phrase = _weighted(BACKGROUND_PHRASES, rng)
    return text + phrase.format(a=_article(scene.background), c=scene.background)


def _name_thing(thing: Thing, rng: random.Random) -> str:
    words = [rng.choice(SIZE_WORDS[thing.size])] if thing.size else []
    if rng.random() > 0.03:
        words.append(thing.colour)
    words.append(thing.shape)
    if rng.random() > 0.1:
        words.insert(0, _article(words[0]))
    return " ".join(words)


def _name_place(place: str | None, rng: random.Random) -> str:
    if place is None:
        return ""
    if place in SIDE_PHRASES:
        return f" {rng.choice(SIDE_PHRASES[place])}"
    words = place.replace("top", "upper").replace("bottom", "lower") if rng.random() < 0.15 else place
    return f" {rng.choice(CORNER_PHRASES).format(words)}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _weighted(choices: tuple[tuple[str, int], ...], rng: random.Random) -> str:
    return rng.choices([text for text, _ in choices], [weight for _, weight in choices])[0]


def pack(scene: Scene) -> list[float]:
    """Flatten a scene to SCENE_FIELDS numbers: the background's rgb, then two things; shape -1 is no thing."""
    row = [channel / 255 for channel in COLOURS[scene.background]]
    for thing in scene.things:
        rgb = [channel / 255 for channel in COLOURS[thing.colour]]
        row += [SHAPES.index(thing.shape), thing.x, thing.y, thing.radius, *rgb]
    return row + [-1.0, 0.5, 0.5, 0.1, 0.0, 0.0, 0.0] * (2 - len(scene.things))


def render(rows: torch.Tensor, side: int = SIDE) -> torch.Tensor:
    """Draw packed scenes, antialiased, on the rows' device.

    rows: (batch, SCENE_FIELDS) float32. Returns (batch, 3, side, side) in [0, 1].
    """
    axis = (torch.arange(side, device=rows.device, dtype=rows.dtype) + 0.5) / side
    pictures = rows[:, :3, None, None].expand(-1, -1, side, side)
    for thing in rows[:, 3:].split(THING_FIELDS, dim=1):
        shape, x, y, radius = (thing[:, i, None, None] for i in range(4))
        u = ((axis[None, None, :] - x) / radius).expand(-1, side, -1)
        v = ((axis[None, :, None] - y) / radius).expand(-1, -1, side)
        distance = torch.full_like(u, torch.inf)
        for index, measure in enumerate(_DISTANCES):
            distance = torch.where(shape == index, measure(u, v), distance)
        coverage = (0.5 - distance * radius * side).clamp(0, 1)[:, None]  # (batch, 1, side, side)
        pictures = torch.lerp(pictures, thing[:, 4:7, None, None].expand_as(pictures), coverage)
    return pictures


# Signed distances in units of the radius, v pointing down, negative inside; exact where an edge is near.


def _circle(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.hypot(u, v) - 1


def _square(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.maximum(u.abs(), v.abs()) - 0.95


def _triangle(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.maximum(v - 0.866, 0.866 * u.abs() - 0.5 * (v + 0.866))


def _diamond(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return 0.6 * (u.abs() / 0.75 + v.abs() - 1)


def _cross(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    x, y = u.abs(), v.abs()
    return torch.minimum(torch.maximum(x - 1, y - 0.33), torch.maximum(x - 0.33, y - 1))


def _ring(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (torch.hypot(u, v) - 0.74).abs() - 0.26


_DISTANCES = (_circle, _square, _triangle, _diamond, _cross, _ring)


def write_prompts(folder: Path, count: int, seed: int) -> None:
    """Write the prompts that the card's figures are measured on, one a line."""
    for name, held in (("prompts_seen.txt", False), ("prompts_heldout.txt", True)):
        rng = random.Random(f"{name} {seed}")
        lines = [caption(sample_scene(rng, held), rng) for _ in range(count)]
        (folder / name).write_text("\n".join(lines) + "\n")


def main() -> None:
    """Write prompts_seen.txt and prompts_heldout.txt beside this file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=2026)
    args = parser.parse_args()
    write_prompts(Path(__file__).parent, args.count, args.seed)


if __name__ == "__main__":
    main()
