"""Pictures and masks that travel in a request, against numpy and Pillow's own readers."""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from services.errors import InvalidRequest
from services.sampler import references
from services.sampler.references import decode, decode_mask
from tests.sampler.image_files import chunk, noise, png, red_for_green_profile, saved
from tests.stack import ROOT

RGB, RGBA, GREY = noise(6, 10, 3), noise(6, 10, 4), noise(6, 10)
LOSSY = {"quality": 95}
PHOTO = Image.linear_gradient("L").resize((48, 32)).convert("RGB")


def array(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image).astype(float)


def over_white(samples: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(height, width, 4) or (height, width, 2) samples on a white page, unrounded."""
    alpha = samples[..., -1:] / 255
    return samples[..., :-1] * alpha + 255 * (1 - alpha)


def refused(data: bytes, field: str = "mask") -> str:
    """What the refusal says; it names the field, in one line."""
    with pytest.raises(InvalidRequest) as caught:
        decode(data, field)
    ((named, text),) = caught.value.violations
    assert named == field
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray(RGB), "PNG"),
        saved(Image.fromarray(RGB), "WEBP", lossless=True),
        saved(Image.fromarray(GREY), "PNG"),
        saved(Image.fromarray(GREY).convert("1"), "PNG"),
        saved(Image.fromarray(RGB).quantize(7), "PNG"),
        saved(PHOTO, "JPEG", **LOSSY),
        saved(PHOTO, "JPEG", progressive=True, subsampling=2),
        saved(PHOTO.convert("L"), "JPEG", **LOSSY),
        saved(PHOTO, "WEBP", quality=60),
    ],
    ids=["png", "webp", "grey", "1-bit", "palette", "jpeg", "progressive", "grey-jpeg", "lossy-webp"],
)
def test_opaque_pictures_are_what_pillow_reads(data: bytes) -> None:
    """RGB, and for a mask its luma."""
    want = Image.open(io.BytesIO(data))
    picture, mask = decode(data, "image"), decode_mask(data, "mask")

    assert (picture.mode, mask.mode, type(picture)) == ("RGB", "L", Image.Image)
    assert np.array_equal(array(picture), array(want.convert("RGB")))
    assert np.array_equal(array(mask), array(want.convert("RGB").convert("L")))


@pytest.mark.parametrize(
    ("data", "samples"),
    [
        (saved(Image.fromarray(RGBA), "PNG"), RGBA),
        (saved(Image.fromarray(RGBA), "WEBP", lossless=True, exact=True), RGBA),
        (saved(Image.fromarray(noise(6, 10, 2), "LA"), "PNG"), noise(6, 10, 2)),
        (png(noise(6, 10, 2) * np.uint16(257), 16, 4), noise(6, 10, 2)),
        (png(RGBA * np.uint16(257), 16, 6), RGBA),
    ],
    ids=["png", "webp", "grey", "grey-16", "rgba-16"],
)
def test_transparency_is_laid_over_white(data: bytes, samples: NDArray[np.uint8]) -> None:
    """To the nearest level."""
    assert np.abs(array(decode(data, "image")) - over_white(samples)).max() <= 0.51


def test_palettes_may_be_transparent() -> None:
    """One entry, or each by so much."""
    indices = noise(6, 10) % 4
    colours = noise(4, 3, seed=1)
    for alphas in (b"\xff\xff\x00", b"\x20\xff\x80"):
        data = png(indices, 8, 3, chunk(b"PLTE", colours.tobytes()) + chunk(b"tRNS", alphas))
        table = np.concatenate([colours, np.frombuffer(alphas + b"\xff", np.uint8)[:, None]], 1)

        assert np.abs(array(decode(data, "image")) - over_white(table[indices])).max() <= 0.51


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_grey(depth: int) -> None:
    """One level of grey is transparent: it is white then, also where samples have few or many bits."""
    top = 2**depth - 1
    levels = (np.arange(16).reshape(4, 4) * (257 if depth == 16 else 1)) & top
    key = int(levels[0, 1])
    grey = decode_mask(png(levels, depth, 0, chunk(b"tRNS", struct.pack(">H", key))), "mask")

    assert np.array_equal(array(grey), np.where(levels == key, 255, levels.astype(float) * 255 // top))


def test_a_transparent_colour() -> None:
    """Of 8 bits it is white then; of 16 it is refused, for Pillow keeps 8 of them."""
    key = chunk(b"tRNS", struct.pack(">HHH", *(int(v) for v in RGB[2, 3])))
    want = RGB.copy()
    want[2, 3] = 255

    assert np.array_equal(array(decode(png(RGB, 8, 2, key), "image")), want)
    assert "transparent colour of 16 bits" in refused(png(RGB * np.uint16(257), 16, 2, key))


def test_sixteen_bits_become_their_upper_eight() -> None:
    """In grey as in colour: scaled, not clipped."""
    edges = np.array([0, 1, 127, 128, 255, 256, 257, 32767, 32896, 65279, 65280, 65535], np.uint16)
    samples = np.concatenate([edges, np.random.default_rng(1).integers(0, 65536, 36, dtype=np.uint16)]).reshape(6, 8)
    colour = np.stack([samples, samples[::-1], samples.T.reshape(6, 8)], -1)

    assert np.array_equal(array(decode_mask(png(samples, 16, 0), "mask")), samples >> 8)
    assert np.array_equal(array(decode(png(samples, 16, 0), "image")), np.repeat((samples >> 8)[..., None], 3, -1))
    assert np.array_equal(array(decode(png(colour, 16, 2), "image")), colour >> 8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(kind: str, orientation: int) -> None:
    """As Pillow's exif_transpose turns them, and once only."""
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = "before it"
    exif[ExifTags.Base.Orientation] = orientation
    data = saved(Image.fromarray(RGB).resize((40, 24)), kind, exif=exif.tobytes(), quality=90)
    picture = decode(data, "image")

    want = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(array(picture), array(want))
    assert np.array_equal(array(ImageOps.exif_transpose(picture)), array(want))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1\x12", b"?"]
)
def test_damaged_metadata_turns_nothing(exif: bytes) -> None:
    """A picture with Exif data that make no sense is shown as stored, and nobody is warned."""
    assert decode(saved(PHOTO, "JPEG", exif=exif), "image").size == PHOTO.size


FLAT = np.array([[20, 90, 160, 30], [255, 0, 128, 0], [0, 0, 0, 200], [70, 70, 70, 70]], np.uint8)


def cmyk_jpeg(samples: NDArray[np.uint8], **options: Any) -> bytes:
    """Patches of 16x16 of one colour each, so that the transform loses nothing."""
    patches = np.repeat(np.repeat(samples.reshape(2, 2, 4), 16, 0), 16, 1)
    return saved(Image.fromarray(patches, "CMYK"), "JPEG", quality=100, **options)


def patch_colours(image: Image.Image) -> NDArray[np.float64]:
    return array(image)[8::16, 8::16].reshape(4, 3)


def test_cmyk_is_inks_on_paper() -> None:
    """R = (1 - C)(1 - K): ink takes light away, also without Adobe's marker."""
    data = cmyk_jpeg(FLAT)
    at = data.index(b"\xff\xee")
    without = data[:at] + data[at + 2 + struct.unpack_from(">H", data, at + 2)[0] :]
    want = (255 - FLAT[:, :3].astype(float)) * (255 - FLAT[:, 3:].astype(float)) / 255

    assert b"Adobe" in data
    assert b"Adobe" not in without
    assert np.abs(patch_colours(decode(data, "image")) - want).max() <= 1.5
    assert np.abs(patch_colours(decode(without, "image")) - want).max() <= 1.5


def test_ycck_is_cmyk_behind_a_transform() -> None:
    """C, M and Y travel as the YCbCr of 255 minus them (T.872), K as it is; all of it inverted by Adobe."""
    inverted = np.array([[200, 100, 140, 220], [90, 128, 128, 255], [120, 160, 90, 128], [255, 128, 128, 10]], np.uint8)
    data = bytearray(cmyk_jpeg(255 - inverted))
    at = data.index(b"Adobe")
    assert data[at + 11] == 0
    data[at + 11] = 2  # says YCCK
    y, cb, cr, k = inverted.astype(float).T
    light = np.stack(
        [y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)]
    )
    stored_cmy = 255 - light.clip(0, 255)
    want = (stored_cmy * k / 255).T  # stored inverted: 255 is no ink

    assert np.abs(patch_colours(decode(bytes(data), "image")) - want).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_profiles_are_followed_to_srgb(kind: str) -> None:
    """A profile that exchanges red and green does; one that is broken, or for other channels, changes nothing."""
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0}
    profile = red_for_green_profile()
    image = Image.fromarray(RGB).resize((32, 16), Image.Resampling.NEAREST)
    plain = array(decode(saved(image, kind, **options), "image"))
    followed = array(decode(saved(image, kind, icc_profile=profile, **options), "image"))
    broken = array(decode(saved(image, kind, icc_profile=profile[:300], **options), "image"))
    grey = saved(image.convert("L"), kind, icc_profile=profile, **options)
    as_mask = decode_mask(saved(image, kind, icc_profile=profile, **options), "mask")

    assert np.abs(followed - plain[..., [1, 0, 2]]).max() <= 2
    assert np.array_equal(broken, plain)
    assert np.abs(array(decode(grey, "image")) - array(image.convert("L"))[..., None]).max() <= (
        50 if kind == "WEBP" else 2
    )
    assert np.array_equal(array(as_mask), array(Image.fromarray(plain.astype(np.uint8)).convert("L")))


def test_transparent_pictures_have_profiles_too() -> None:
    """Colours are converted first, then laid over white."""
    data = saved(Image.fromarray(RGBA), "PNG", icc_profile=red_for_green_profile())

    assert np.abs(array(decode(data, "image")) - over_white(RGBA[..., [1, 0, 2, 3]])).max() <= 2


def webp(width: int, height: int) -> bytes:
    """The beginning of a WebP with this canvas, and no frame."""
    body = b"\0" * 4 + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + body


def sof(width: int, height: int) -> bytes:
    """A JPEG's frame header, of one grey component."""
    return b"\xff\xc0" + struct.pack(">HBHHBBBB", 11, 8, height, width, 1, 1, 0x11, 0)


def jpeg(width: int, height: int) -> bytes:
    data = bytearray(saved(Image.new("RGB", (8, 8)), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


TINY = np.zeros((1, 1), np.uint8)
ANIMATION = {"save_all": True, "append_images": [Image.fromarray(RGB[::-1])], "duration": 100}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b"x" * (references.FILE_LIMIT_BYTES + 1), "has 16777217 bytes, at most 16777216"),
        (b"x" * 1000, "neither PNG nor JPEG nor WebP"),
        (saved(PHOTO, "GIF"), "neither PNG"),
        (saved(PHOTO, "TIFF"), "neither PNG"),
        (saved(PHOTO, "BMP"), "neither PNG"),
        (png(TINY, 8, 0, size=(0, 5)), "no pixels, it is 0x5"),
        (jpeg(8, 0), "no pixels"),
        (png(TINY, 8, 0, size=(8000, 5001)), "8000x5001 pixels, at most 40000000"),
        (png(TINY, 8, 2, size=(2**31 - 1, 2**31 - 1)), "at most 40000000"),
        (jpeg(65_000, 65_000), "at most 40000000"),
        (webp(1 << 24, 1 << 24), "at most 40000000"),
        (png(TINY, 8, 0, size=(1, 101)), "1x101, one edge may be at most 100 times"),
        (jpeg(10_000, 10), "one edge"),
        (saved(Image.fromarray(RGB), "PNG", **ANIMATION), "animation of 2 frames"),
        (saved(Image.fromarray(RGB), "WEBP", **ANIMATION), "animation of 2 frames"),
        (png(TINY, 8, 0, size=(3, 3)), "damaged or unusual PNG"),
        (png(TINY, 8, 5), "damaged or unusual PNG"),
        (saved(PHOTO, "PNG")[:-20], "truncated"),
        (saved(PHOTO, "JPEG")[:-40], "damaged or unusual JPEG"),
        (saved(PHOTO, "JPEG")[:100], "truncated"),
        (saved(PHOTO, "WEBP")[:-3], "truncated"),
        (saved(PHOTO, "PNG").replace(b"IDAT", b"IDAU"), "checksum"),
        (jpeg(8, 8).replace(b"\xff\xda", sof(60_000, 60_000) + b"\xff\xda"), "two headers"),
        (saved(PHOTO, "JPEG", progressive=True)[:-2] + b"\xff\xda" * 100 + b"\xff\xd9", "100 scans"),
    ],
)  # fmt: skip
def test_what_is_refused(data: bytes, says: str) -> None:
    """Under the field's name, in one line that says what was found."""
    assert says in refused(data, "reference_images[1].data")


def test_limits_are_inside() -> None:
    """The largest picture that is let through, and the longest."""
    assert decode(saved(Image.new("1", (8000, 5000)), "PNG"), "image").size == (8000, 5000)
    assert decode(saved(Image.new("L", (100, 1)), "PNG"), "image").size == (100, 1)


def sound_files() -> list[bytes]:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    extra = {"exif": exif.tobytes(), "icc_profile": red_for_green_profile()}
    return [
        saved(Image.fromarray(RGBA), "PNG", **extra),
        saved(Image.fromarray(RGB).quantize(5), "PNG", transparency=b"\1\2", **extra),
        png(noise(4, 4).astype(np.uint16) * 200, 16, 0, chunk(b"tRNS", b"\1\2")),
        saved(PHOTO, "JPEG", **extra),
        saved(PHOTO, "JPEG", progressive=True),
        cmyk_jpeg(FLAT),
        saved(PHOTO, "WEBP", **extra),
        saved(Image.fromarray(RGBA), "WEBP", lossless=True, **extra),
    ]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Bytes changed, cut out or repeated; PNG's checksums set right again, or nothing behind them would be reached."""
    mutant = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(mutant))
        match chance.randrange(4):
            case 0:
                mutant[at] = chance.randrange(256)
            case 1:
                mutant[at : at + 4] = chance.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"])
            case 2:
                del mutant[at : at + chance.randint(1, 40)]
            case 3:
                mutant[at:at] = mutant[at : at + chance.randint(1, 40)]
        mutant = mutant or bytearray(b"\x89")
    return with_checksums(bytes(mutant)) if chance.random() < 0.8 else bytes(mutant)


def with_checksums(data: bytes) -> bytes:
    mended, at = bytearray(data), 8
    while data.startswith(b"\x89PNG") and at + 12 <= len(data):
        length = struct.unpack_from(">I", data, at)[0]
        if at + 12 + length > len(data):
            break
        struct.pack_into(">I", mended, at + 8 + length, zlib.crc32(data[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(mended)


@pytest.mark.parametrize("seed", range(8))
def test_damaged_files_are_pictures_or_refused(seed: int) -> None:
    """Whatever bytes come: an image within the limits, or a refusal. Warnings are errors here."""
    chance = random.Random(seed)
    outcomes = set()
    for _ in range(60):
        data = mutated(sound_files()[seed], chance)
        try:
            image = decode(data, "image")
        except InvalidRequest:
            outcomes.add("refused")
        else:
            outcomes.add("decoded")
            assert image.mode == "RGB"
            assert image.width * image.height <= references.AREA_LIMIT_PX

    assert outcomes == {"refused", "decoded"}


def test_many_threads_decode_at_once() -> None:
    files = sound_files() * 4
    alone = [array(decode(data, "image")) for data in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: array(decode(data, "image")), files))

    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def bomb(inflated: int) -> bytes:
    """Deflated zeros."""
    deflater = zlib.compressobj(9)
    return b"".join(deflater.compress(bytes(1 << 20)) for _ in range(inflated >> 20)) + deflater.flush()


def hostile_files() -> list[bytes]:
    """Small ones that unpack to gigabytes of pixels, text, profile, or more rows than the header says."""
    zeros = bomb(128 << 20)
    texts = [chunk(kind, b"k%d" % k + head + zeros) for k in range(16) for kind, head in TEXTS]
    flooded = png(noise(8, 8), 8, 0)[:33] + chunk(b"IDAT", zeros) + chunk(b"IEND", b"")
    return [
        png(TINY, 8, 6, size=(8000, 5001)),
        jpeg(60_000, 60_000),
        webp(16_000, 16_000),
        png(noise(8, 8), 8, 0, b"".join(texts) + chunk(b"iCCP", b"p\0\0" + zeros)),
        flooded,
    ]


TEXTS = [(b"zTXt", b"\0\0"), (b"iTXt", b"\0\1\0\0\0")]
LARGE = (2400, 2000)


def large_files() -> list[bytes]:
    """Large pictures that are what they say, of the kinds that take most."""
    shades = Image.linear_gradient("L").resize(LARGE)
    colours = Image.merge("RGBA", [shades, shades.rotate(180), shades, shades])
    turned = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0"
    more = {"icc_profile": red_for_green_profile(), "exif": turned}
    return [
        saved(colours, "PNG", **more),
        saved(colours, "WEBP", **more),
        saved(colours.convert("RGB").convert("CMYK"), "JPEG", progressive=True, exif=turned),
        png(np.asarray(shades).astype(np.uint16), 16, 0, chunk(b"tRNS", b"\0\0")),
    ]


def outcomes_within(bytes_each: int, files: list[bytes], folder: Path) -> list[str]:
    """What a new process makes of the files, one after the other, with so much memory beyond what it has already."""
    for number, data in enumerate(files):
        (folder / str(number)).write_bytes(data)
    command = [sys.executable, "-m", "tests.sampler.decoder", str(bytes_each), *map(str, range(len(files)))]
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT}/gen", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=os.environ | paths, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


SLACK_BYTES = 24 << 20


def test_bombs_take_no_memory(tmp_path: Path) -> None:
    """What would unpack to gigabytes is refused or left out."""
    assert outcomes_within(SLACK_BYTES, hostile_files(), tmp_path) == ["refused"] * 3 + ["decoded"] * 2


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Large pictures decode in the memory that is stated, and not in half of it: so the statement is tested."""
    stated = LARGE[0] * LARGE[1] * references.MEMORY_PX_BYTES

    assert outcomes_within(stated + SLACK_BYTES, large_files(), tmp_path) == ["decoded"] * 4
    assert "decoded" not in outcomes_within(stated // 2, large_files()[1:2], tmp_path)
