"""Where the command line puts pictures, and the checks made before anything is asked of a server."""

import asyncio
import os
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import InvalidRequest
from .events import Image, Preview, Result
from .files import write_whole

SUFFIXES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
FORMATS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}  # and the suffix of each
SIZE = re.compile(r"(\d{1,5})[xX](\d{1,5})")


@dataclass(frozen=True)
class Outputs:
    """Names of files: `path` for one picture; with the index before the suffix (out-0.png) if there are several."""

    path: Path
    format: str
    count: int
    preview_dir: Path | None

    @classmethod
    def asked(cls, path: Path | None, kind: str | None, count: int, preview_dir: Path | None) -> "Outputs":
        """What is not said follows: the encoding from the suffix, the name from the encoding. Raises InvalidRequest."""
        if path is None:
            path = Path("out" + FORMATS[kind or "png"])
        by_suffix = SUFFIXES.get(path.suffix.lower())
        if kind is None and by_suffix is None:
            raise InvalidRequest.of(("--output", f"{str(path)!r} must end in {', '.join(SUFFIXES)}, or say --format"))
        if kind is not None and by_suffix not in (kind, None):
            raise InvalidRequest.of(("--format", f"is {kind}, but {str(path)!r} is a name for {by_suffix}"))
        return cls(path, kind or by_suffix or "", count, preview_dir)

    def check(self) -> None:
        """Raises InvalidRequest if the files could not be written."""
        if self.path.is_dir():
            raise InvalidRequest.of(("--output", f"{self.path} is a directory"))
        _check_directory("--output", self.path.parent)
        if self.preview_dir is not None:
            _check_directory("--save-preview", self.preview_dir)

    def image_path(self, index: int) -> Path:
        """Where picture `index` goes."""
        return self.path if self.count == 1 else self.path.with_stem(f"{self.path.stem}-{index}")

    def write(self, image: Image) -> Path:
        """Write a picture; an existing file is replaced. Raises OSError."""
        path = self.image_path(image.image_index)
        write_whole(path, image.data)
        return path

    def write_preview(self, preview: Preview) -> None:
        """Write a preview, e.g. out-0-step-3.png, if they are wanted. Raises OSError."""
        if self.preview_dir is not None:
            name = f"{self.image_path(preview.image_index).stem}-step-{preview.step}.png"
            write_whole(self.preview_dir / name, preview.data)


@dataclass(frozen=True)
class Folder:
    """Keeps the pictures of many requests, named by request and seed: 00012-seed-19.png."""

    path: Path

    def check(self) -> None:
        """Raises InvalidRequest if the files could not be written."""
        _check_directory("--output", self.path)

    async def keep(self, index: int, result: Result) -> None:
        """Write the pictures of request `index` without holding up the loop. Raises OSError."""
        for image in result.images:
            path = self.path / f"{index:05}-seed-{image.seed}.{image.format}"
            await asyncio.to_thread(write_whole, path, image.data)


def _check_directory(option: str, directory: Path) -> None:
    if not directory.is_dir():
        raise InvalidRequest.of((option, f"the directory {directory} does not exist; make it first"))
    if not os.access(directory, os.W_OK | os.X_OK):
        raise InvalidRequest.of((option, f"the directory {directory} is not writable"))


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """Width and height of "1024x688"; None for the model's. Raises InvalidRequest."""
    if text is None:
        return None, None
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidRequest.of(("--size", f"{text!r} is no size; write WIDTHxHEIGHT, e.g. 1024x688"))
    return int(match[1]), int(match[2])
