"""Pictures on one sheet, each with its prompt under it."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

PICTURE_PX = 256
GAP_PX = 24
LINE_PX = 22
LINES = 3
COLUMNS = 4
PAPER, INK, PALE = "#ffffff", "#1c2128", "#6b7480"


@dataclass(frozen=True, slots=True)
class Exhibit:
    """A drawn picture."""

    prompt: str
    file: Path
    note: str


def contact_sheet(exhibits: list[Exhibit], title: str) -> Image.Image:
    """All pictures in rows of four under a title."""
    row_px = PICTURE_PX + LINE_PX * (LINES + 1) + GAP_PX
    rows = -(-len(exhibits) // COLUMNS)
    width = COLUMNS * (PICTURE_PX + GAP_PX) + GAP_PX
    sheet = Image.new("RGB", (width, 64 + rows * row_px), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP_PX, 20), title, INK, ImageFont.load_default(size=22))
    for index, exhibit in enumerate(exhibits):
        row, column = divmod(index, COLUMNS)
        _hang(sheet, exhibit, GAP_PX + column * (PICTURE_PX + GAP_PX), 64 + row * row_px)
    return sheet


def _hang(sheet: Image.Image, exhibit: Exhibit, x: int, y: int) -> None:
    draw = ImageDraw.Draw(sheet)
    with Image.open(exhibit.file) as picture:
        picture.thumbnail((PICTURE_PX, PICTURE_PX))
        scale = PICTURE_PX // max(picture.size)
        sheet.paste(picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.LANCZOS), (x, y))
    draw.rectangle((x - 1, y - 1, x + PICTURE_PX, y + PICTURE_PX), outline="#c9ced6")
    font = ImageFont.load_default(size=16)
    lines = _wrapped(exhibit.prompt, font)
    for number, line in enumerate(lines):
        draw.text((x, y + PICTURE_PX + 8 + number * LINE_PX), line, INK, font)
    draw.text((x, y + PICTURE_PX + 8 + len(lines) * LINE_PX), exhibit.note, PALE, ImageFont.load_default(size=14))


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > PICTURE_PX:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines[:LINES]
