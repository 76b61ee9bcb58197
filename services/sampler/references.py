"""Pictures and masks that travel in a request: decoded within bounds, upright, in the colours they are meant to have.

Headers are read first (containers.py): a file that is too large is refused before a pixel is allocated. Then Pillow's
plugin for PNG, JPEG or WebP decodes what is left of the file, and no other plugin, whatever is registered. Nothing
global is touched and no file is opened: safe from many threads. Decoding takes at most MEMORY_PX_BYTES for each pixel.

- Transparency is laid over white, as on a white page. In a mask white is repainted, so what is transparent is, too.
- A colour profile is followed to sRGB; one that is broken, or for other channels than the file has, is passed over.
  Masks are data: their profiles are not looked at. PNG's gAMA and cHRM, without a profile, are not either.
- Samples of 16 bits become their upper eight, as libpng's png_set_strip_16 and Pillow have it. (Pillow's own way from
  16-bit grey to 8 would clip instead.)
- CMYK and YCCK of JPEG are inverted as Adobe writes them, whether or not Adobe's marker is there; without a profile
  R = (1 - C)(1 - K), and so on.
- An animation is refused rather than a frame of it chosen.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageCms, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from services.errors import InvalidRequest
from services.sampler import containers
from services.sampler.containers import Encoded, UnreadableError

FILE_LIMIT_BYTES = 16 << 20
AREA_LIMIT_PX = 40_000_000
ASPECT_LIMIT = 100  # longer edge to shorter
MEMORY_PX_BYTES = 20  # most for a WebP with alpha: the decoder's two canvases, the picture, its parts
PLUGINS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
}
# What undoes each of Exif's orientations.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, field: str) -> Image.Image:
    """The picture in a PNG, JPEG or WebP file: mode RGB, upright, sRGB. Raises InvalidRequest naming `field`."""
    return _decoded(data, field, "RGB", follow_profile=True)


def decode_mask(data: bytes, field: str) -> Image.Image:
    """The mask in such a file: mode L, upright; colours become their luma (ITU-R 601). Raises as `decode`."""
    return _decoded(data, field, "L", follow_profile=False)


def _decoded(data: bytes, field: str, mode: str, *, follow_profile: bool) -> Image.Image:
    try:
        encoded = _checked(data)
        colour, alpha = _channels(encoded)
        if follow_profile and encoded.profile:
            colour = _in_srgb(colour, encoded.profile)
        picture = _over_white(colour if colour.mode == "L" else _as(colour, "RGB"), alpha)
        upright = picture.transpose(UPRIGHT[encoded.orientation]) if encoded.orientation in UPRIGHT else picture
        result = _as(upright, mode)
    except UnreadableError as refusal:
        raise InvalidRequest((field, f"the file {refusal}: send one whole PNG, JPEG or WebP")) from refusal
    result.info.clear()  # or whoever looks there for an orientation turns it again
    return result


def _checked(data: bytes) -> Encoded:
    """Headers of a file that is worth decoding."""
    if not data:
        raise UnreadableError("is empty")
    if len(data) > FILE_LIMIT_BYTES:
        raise UnreadableError(f"has {len(data)} bytes, at most {FILE_LIMIT_BYTES} are taken")
    encoded = containers.read(data)
    width, height = encoded.width_px, encoded.height_px
    if not width or not height:
        raise UnreadableError(f"has no pixels, it is {width}x{height}")
    if width * height > AREA_LIMIT_PX:
        raise UnreadableError(f"has {width}x{height} pixels, at most {AREA_LIMIT_PX} are taken")
    if max(width, height) > ASPECT_LIMIT * min(width, height):
        raise UnreadableError(f"is {width}x{height}, one edge may be at most {ASPECT_LIMIT} times the other")
    if encoded.frames > 1:
        raise UnreadableError(f"is an animation of {encoded.frames} frames")
    return encoded


def _channels(encoded: Encoded) -> tuple[Image.Image, Image.Image | None]:
    """The colours, in mode L, RGB or CMYK, and how opaque they are, in mode L, if not everywhere fully."""
    try:
        image = _opened(encoded)
        image.load()
        if image.mode == "I;16":
            return _upper_eight_bits(image)
        if "transparency" in image.info:
            return _split(_keyed(image, encoded.depth))
        return _split(image)
    except (UnreadableError, MemoryError):
        raise
    except Exception as error:  # decoders of damaged files raise whatever they met
        raise UnreadableError(f"is a damaged or unusual {encoded.format} and cannot be decoded") from error


def _opened(encoded: Encoded) -> Image.Image:
    image = PLUGINS[encoded.format](io.BytesIO(encoded.file))
    if image.size != (encoded.width_px, encoded.height_px):
        raise UnreadableError("is damaged: its headers contradict each other")
    return image


def _upper_eight_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    samples = np.asarray(image)
    grey = Image.fromarray((samples >> 8).astype(np.uint8))
    key = image.info.get("transparency")
    return grey, None if key is None else Image.fromarray((samples != key).astype(np.uint8) * np.uint8(255))


def _keyed(image: Image.Image, depth: int) -> Image.Image:
    """The image with the alpha that its tRNS chunk means: of palette entries, or of one transparent colour."""
    if image.mode == "RGB" and depth == 16:
        raise UnreadableError("names a transparent colour of 16 bits, which is not served (an alpha channel is)")
    if image.mode == "L" and depth < 8:  # samples have been stretched to 8 bits, the key has not
        image.info["transparency"] *= 255 // (2**depth - 1)
    return image.convert("RGBA")


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    match image.mode:
        case "RGBA":
            return image.convert("RGB"), image.getchannel("A")
        case "LA":
            return image.getchannel("L"), image.getchannel("A")
        case "P":
            return image.convert("RGB"), None
        case "1":
            return image.convert("L"), None
    return image, None


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ImportError):  # broken; for other channels; a Pillow without LittleCMS
        return image
    assert converted is not None  # only `inPlace` gives none
    return converted


def _over_white(colour: Image.Image, alpha: Image.Image | None) -> Image.Image:
    if alpha is None:
        return colour
    page = Image.new(colour.mode, colour.size, "white")
    page.paste(colour, mask=alpha)
    return page


def _as(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode and type(image) is Image.Image else image.convert(mode)
