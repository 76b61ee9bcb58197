"""Judge pictures by their pixels and their prompts alone, and measure how often the demo model is right.

    python models/demo/check.py --pictures 200

A picture is right if it holds the things that the prompt names and no others, each of the named colour, shape and
size, at the named place or in the named relation, on the named background, with flat colours and clean outlines.
Nothing here knows the model or the code that draws its training pictures: colours are ranges of hue, shapes are
outlines of their own, and the prompt is read from its words.
"""

import argparse
import colorsys
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

FOLDER = Path(__file__).parent
STEPS, SIDE, GUIDANCE = 9, 128, 1.5  # the settings that the card recommends, and headwater.json

# A colour is grey-like below this saturation, told apart by value; else its hue, in degrees, says which it is.
GREYS = {"black": (0.0, 0.2), "white": (0.93, 1.0)}
GREY_SATURATION = 0.12
HUES = {
    "red": (-14, 12),
    "yellow": (44, 62),
    "green": (110, 160),
    "blue": (208, 238),
    "purple": (260, 292),
    "pink": (315, 345),
}

OUTLINE = 512  # side of the bitmap in which shapes are compared
SMALLEST_THING = 12  # pixels; fewer are a stray mark, more are a thing
LIKENESS = 0.8  # intersection over union with the ideal outline, in the thing's own bounding box; blunt tips cost 0.1
UNEVENNESS = 30.0  # grey levels of 255: how far the farthest 2 % of a flat area may be from its median
STRAY = 40.0  # grey levels from the background that make a pixel part of something

# Size: half the longest extent, as a fraction of the side, between which each word is true: (alone, sharing).
SIZES = {"small": ((0.06, 0.155), (0.05, 0.122)), "large": ((0.245, 0.36), (0.173, 0.26))}
SIDE_BAND = 0.42  # a centre below it is left or top, above 1 minus it right or bottom, else in the middle

SYNONYMS = {
    "centre": "center",
    "middle": "center",
    "upper": "top",
    "lower": "bottom",
    "over": "above",
    "under": "below",
    "beneath": "below",
    "little": "small",
    "tiny": "small",
    "big": "large",
    "huge": "large",
}
SHAPE_NAMES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLOUR = "(" + "|".join((*GREYS, *HUES)) + ")"
THING = rf"(?:an? |the )?(?:(small|large) )?(?:{COLOUR} )?({'|'.join(SHAPE_NAMES)})"
RELATION = r"(?:to the |on the )?(left of|right of|above|below|and|next to|with)"
PLACE = r"(?:in|at|on|near) (?:the )?((?:top|bottom|left|right|center)(?: left| right)?)(?: corner| side)?"
BACKGROUND = rf"(?:on |against |, )(?:an? |the )?{COLOUR}(?: background)?"
LEAD = r"(?:an? (?:picture|drawing|image) of )?"
PROMPT = re.compile(rf"{LEAD}{THING}(?: {RELATION} {THING})?(?: {PLACE})?(?: ?{BACKGROUND})?")


@dataclass(frozen=True)
class Wanted:
    """What a prompt asks of one thing; None is not asked."""

    size: str | None
    colour: str | None
    shape: str


@dataclass(frozen=True)
class Request:
    """What a prompt asks."""

    things: tuple[Wanted, ...]
    relation: str | None
    place: str | None
    background: str | None


@dataclass(frozen=True)
class Found:
    """One thing seen in a picture; x, y (of its bounding box's centre) and extent are fractions of the side."""

    colour: str
    shape: str
    likeness: float
    extent: float
    x: float
    y: float
    unevenness: float


@dataclass(frozen=True)
class Result:
    """One measured picture; it is right if no fault was found."""

    prompt: str
    picture: Image.Image
    faults: list[str]
    seconds: float


def read_prompt(text: str) -> Request:
    """Read a prompt. Raises ValueError if it says something that this file cannot judge."""
    words = re.findall(r"[a-z]+|,", text.lower())
    match = PROMPT.fullmatch(" ".join(SYNONYMS.get(word, word) for word in words))
    if match is None:
        raise ValueError(f"cannot judge a picture of {text!r}")
    size, colour, shape, relation, size2, colour2, shape2, place, background = match.groups()
    things = (Wanted(size, colour, shape),)
    if shape2:
        things += (Wanted(size2, colour2, shape2),)
    return Request(things, relation, place, background)


def name_colour(rgb: np.ndarray) -> str:
    """Name a colour (r, g, b of 255), or return 'unclear'."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(float(channel) / 255 for channel in rgb))
    if saturation < GREY_SATURATION or value < 0.15:
        return next((name for name, (low, high) in GREYS.items() if low <= value <= high), "unclear")
    degrees = hue * 360
    for name, (low, high) in HUES.items():
        if low <= degrees <= high or low <= degrees - 360 <= high:
            return name
    return "unclear"


def ideal_outlines() -> dict[str, np.ndarray]:
    """Return each shape as a (OUTLINE, OUTLINE) boolean bitmap that fills its own bounding box."""
    polygons = {
        "circle": _regular(180),
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1), (1, 1), (-1, 1)],
        "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
        "cross": list(_CROSS),
    }
    outlines = {name: _fill(points) for name, points in polygons.items()}
    outlines["ring"] = _fill(_regular(180)) & ~_fill(_regular(180), scale=0.5)
    return outlines


_ARM = 0.33
_CROSS = (
    (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
    (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
)  # fmt: skip


def _polar(radius: float, degrees: float) -> tuple[float, float]:
    return radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))


def _regular(corners: int) -> list[tuple[float, float]]:
    return [_polar(1, 360 * i / corners) for i in range(corners)]


def _fill(points: list[tuple[float, float]], scale: float = 1.0) -> np.ndarray:
    """Fill a polygon stretched to the bitmap's edges, or to a part of them around the middle."""
    corners = np.array(points, dtype=float)
    low, high = corners.min(axis=0), corners.max(axis=0)
    unit = (2 * (corners - low) / (high - low) - 1) * scale
    bitmap = Image.new("1", (OUTLINE, OUTLINE))
    ImageDraw.Draw(bitmap).polygon([tuple(point) for point in (unit + 1) / 2 * (OUTLINE - 1)], fill=1)
    return np.array(bitmap)


def border_colour(pixels: np.ndarray) -> np.ndarray:
    """Return the median colour of the picture's outermost pixels."""
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return np.median(edge, axis=0)


def components(mask: np.ndarray) -> list[np.ndarray]:
    """Split a boolean picture into its connected parts (8 neighbours), as boolean pictures."""
    parts = []
    left = mask.copy()
    while left.any():
        stack = [tuple(np.argwhere(left)[0])]
        part = np.zeros_like(mask)
        left[stack[0]] = False
        while stack:
            row, column = stack.pop()
            part[row, column] = True
            top, start = max(row - 1, 0), max(column - 1, 0)
            near = left[top : row + 2, start : column + 2]
            stack += [(top + r, start + c) for r, c in np.argwhere(near)]
            near[:] = False
        parts.append(part)
    return parts


def shrink(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Take this many pixels off every edge of a boolean picture, the picture's own border aside."""
    for _ in range(pixels):
        padded = np.pad(mask, 1, mode="edge")
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def unevenness(pixels: np.ndarray, area: np.ndarray) -> float:
    """Return how far, in grey levels, the farthest 2 % of an area's pixels are from its median colour."""
    inside = pixels[area]
    if len(inside) == 0:
        return 0.0
    return float(np.quantile(np.abs(inside - np.median(inside, axis=0)).max(axis=1), 0.98))


def find_thing(pixels: np.ndarray, part: np.ndarray, background: np.ndarray, outlines: dict[str, np.ndarray]) -> Found:
    """Describe the thing that a connected part of the picture shows."""
    inside = shrink(part, 2) if shrink(part, 2).any() else part
    colour = np.median(pixels[inside], axis=0)
    # How much of each pixel is the thing's colour, looked at in four times the detail.
    along = colour - background
    share = ((pixels - background) @ along / (along @ along)).clip(0, 1)
    share[~_grow(part)] = 0
    detail = 4
    side = len(pixels)
    fine = Image.fromarray((share * 255).astype(np.uint8)).resize(
        (side * detail, side * detail), Image.Resampling.BILINEAR
    )
    mask = np.array(fine) > 127
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return Found(name_colour(colour), "unclear", 0.0, 0.0, 0.0, 0.0, 0.0)
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    box = Image.fromarray(mask[top:bottom, left:right]).resize((OUTLINE, OUTLINE), Image.Resampling.NEAREST)
    shape, likeness = best_shape(np.array(box), (right - left) / (bottom - top), outlines)
    extent = max(bottom - top, right - left) / 2 / (side * detail)
    x, y = (left + right) / 2 / (side * detail), (top + bottom) / 2 / (side * detail)
    return Found(name_colour(colour), shape, likeness, extent, x, y, unevenness(pixels, inside))


def best_shape(box: np.ndarray, aspect: float, outlines: dict[str, np.ndarray]) -> tuple[str, float]:
    """Return the outline that fills the box most alike, with its intersection over union; none if it is stretched."""
    scores = {name: (box & outline).sum() / (box | outline).sum() for name, outline in outlines.items()}
    name = max(scores, key=lambda key: scores[key])
    return (name if 0.65 < aspect < 1.3 else "unclear"), float(scores[name])


def _grow(mask: np.ndarray) -> np.ndarray:
    """Add two pixels around a boolean picture."""
    return ~shrink(~mask, 2)


def faults(picture: Image.Image, prompt: str) -> list[str]:
    """Return what is wrong with a picture of this prompt; an empty list is a right picture."""
    wanted = read_prompt(prompt)
    pixels = np.asarray(picture.convert("RGB"), dtype=float)
    background = border_colour(pixels)
    differs = np.abs(pixels - background).max(axis=2) > STRAY
    parts = [part for part in components(differs) if part.sum() > SMALLEST_THING]
    found_faults = _background_faults(pixels, ~_grow(differs), background, wanted.background)
    if len(parts) != len(wanted.things):
        return [*found_faults, f"{len(parts)} things, not {len(wanted.things)}"]
    outlines = ideal_outlines()
    things = [find_thing(pixels, part, background, outlines) for part in parts]
    orders = [things] if len(things) == 1 else [things, things[::-1]]
    return found_faults + min((_thing_faults(order, wanted) for order in orders), key=len)


def _background_faults(pixels: np.ndarray, area: np.ndarray, colour: np.ndarray, wanted: str | None) -> list[str]:
    named = name_colour(colour)
    wrong = [f"{named} background, not {wanted}"] if wanted and named != wanted else []
    uneven = unevenness(pixels, area)
    return wrong + ([f"background uneven by {uneven:.0f}"] if uneven > UNEVENNESS else [])


def _thing_faults(things: list[Found], wanted: Request) -> list[str]:
    """Return the faults of things taken in the order in which the prompt names them."""
    wrong = []
    for thing, asked in zip(things, wanted.things, strict=True):
        if asked.colour and thing.colour != asked.colour:
            wrong.append(f"{thing.colour}, not {asked.colour}")
        if thing.shape != asked.shape:
            wrong.append(f"{thing.shape}, not {asked.shape}")
        elif thing.likeness < LIKENESS:
            wrong.append(f"ragged {asked.shape} ({thing.likeness:.2f})")
        if asked.size:
            low, high = SIZES[asked.size][len(things) - 1]
            if not low <= thing.extent <= high:
                wrong.append(f"size {thing.extent:.3f}, not {asked.size}")
        if thing.unevenness > UNEVENNESS:
            wrong.append(f"{asked.shape} uneven by {thing.unevenness:.0f}")
    if wanted.place and place_of(things[0]) != wanted.place:
        wrong.append(f"at {place_of(things[0])}, not {wanted.place}")
    if wanted.relation in OFFSETS and not related(things[0], things[1], OFFSETS[wanted.relation]):
        wrong.append(f"not {wanted.relation}")
    return wrong


# Where the thing named first lies from the other, for the relations that say so.
OFFSETS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def related(first: Found, second: Found, offset: tuple[int, int]) -> bool:
    """Say whether first lies from second in this direction, clearly and along that axis."""
    column, row = offset
    along = column * (first.x - second.x) + row * (first.y - second.y)
    across = abs(row * (first.x - second.x)) + abs(column * (first.y - second.y))
    return along > 0.2 and along > across


def place_of(thing: Found) -> str:
    """Name the place in the picture where a thing is."""
    row = "top" if thing.y < SIDE_BAND else "bottom" if thing.y > 1 - SIDE_BAND else ""
    column = "left" if thing.x < SIDE_BAND else "right" if thing.x > 1 - SIDE_BAND else ""
    return f"{row} {column}".strip() or "center"


def read_prompts(kind: str) -> list[str]:
    """Return the committed prompts of a kind: 'seen' or 'heldout'."""
    return (FOLDER / f"prompts_{kind}.txt").read_text().splitlines()


def measure(folder: Path, prompts: list[str], device: str = "cpu", batch: int = 1) -> list[Result]:
    """Draw each prompt with diffusers' own pipeline, in the folder's dtype, with its line number as the seed."""
    import torch
    from diffusers import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    pipe.set_progress_bar_config(disable=True)
    results = []
    for first in range(0, len(prompts), batch):
        chosen = prompts[first : first + batch]
        seeds = [torch.Generator(device).manual_seed(first + i) for i in range(len(chosen))]
        start = time.perf_counter()
        pictures = pipe(
            list(chosen), height=SIDE, width=SIDE, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=seeds
        ).images
        seconds = (time.perf_counter() - start) / len(chosen)
        results += [Result(p, x, faults(x, p), seconds) for p, x in zip(chosen, pictures, strict=True)]
    return results


def summarise(results: list[Result]) -> dict[str, float]:
    """Return how many pictures there are, how many are right, and the median seconds that one took."""
    right = sum(not result.faults for result in results)
    seconds = sorted(result.seconds for result in results)[len(results) // 2]
    return {"pictures": len(results), "right": right, "seconds": round(seconds, 3)}


def save_sheet(results: list[Result], path: Path, columns: int = 8) -> None:
    """Save the pictures as one, in rows; wrong ones have a red frame around them."""
    rows = math.ceil(len(results) / columns)
    cell = SIDE + 8
    sheet = Image.new("RGB", (columns * cell, rows * cell), "white")
    for i, result in enumerate(results):
        corner = (i % columns * cell, i // columns * cell)
        sheet.paste("red" if result.faults else "lightgray", (*corner, corner[0] + cell - 2, corner[1] + cell - 2))
        sheet.paste(result.picture, (corner[0] + 3, corner[1] + 3))
    sheet.save(path)


def main() -> None:
    """Draw committed prompts with the committed model and print how many pictures are right."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--kind", choices=("heldout", "seen"), default="heldout")
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--sheet", type=Path, help="also save the first 64 pictures as one PNG")
    args = parser.parse_args()
    results = measure(args.model, read_prompts(args.kind)[: args.pictures])
    for result in results:
        if result.faults:
            print(f"{result.prompt}: {'; '.join(result.faults)}")
    if args.sheet:
        save_sheet(results[:64], args.sheet)
    figures = summarise(results)
    share = figures["right"] / figures["pictures"]
    print(f"{args.kind}: {figures['right']} of {figures['pictures']} right ({share:.1%}), {figures['seconds']} s each")


if __name__ == "__main__":
    main()
