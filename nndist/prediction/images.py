"""Open untrusted image files: only known formats, and none that would exhaust the memory.

Pillow detects formats by content, whatever the file's name: an EPS file named x.png would start Ghostscript. A small
file may also declare any number of pixels, which are in memory as soon as they are decoded.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM", "GIF")
MAX_PIXELS = 100_000_000
MAX_PROPORTION = 100  # the longer side to the shorter: scaled by the shorter, the longer would grow as much


class BadImage(ValueError):
    """An image is refused: the message says why, without the file's name."""


def open_image(source: str | Any | IO[bytes]) -> Image:
    """Open an image, checked before anything is decoded; use it in a `with` statement.

    source: a path, or an open file. Raises BadImage for a size or proportions beyond the limits, and Pillow's errors
    for anything but an image of FORMATS.
    """
    from PIL import Image

    if not set(FORMATS) <= set(Image.OPEN):
        Image.init()  # before that only a few formats are registered
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # these limits apply instead
        image = Image.open(source, formats=[name for name in FORMATS if name in Image.OPEN])  # others lack a library
    try:
        check_size(*image.size)
    except BadImage:
        image.close()
        raise
    return image


def check_size(width: int, height: int) -> None:
    """Raises BadImage if an image has no pixels or too many, or is too long and narrow."""
    if not (width > 0 and height > 0):
        raise BadImage(f"has {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise BadImage(f"has {width:,} x {height:,} pixels; the limit is {MAX_PIXELS / 1e6:g} million; scale it down")
    if max(width, height) > MAX_PROPORTION * min(width, height):
        raise BadImage(f"has {width:,} x {height:,} pixels, more than {MAX_PROPORTION} times as long as wide; crop it")


def upright(image: Image) -> Image:
    """The image turned as its EXIF data say, and laid on white where it is transparent."""
    from PIL import Image, ImageOps

    image.load()
    with contextlib.suppress(Exception):  # EXIF data that Pillow can't write again: the pixels are good
        image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        colours = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours)
    return image


def why(error: Exception) -> str:
    """What is wrong with an image, for a person."""
    if isinstance(error, BadImage):
        return str(error)
    return getattr(error, "strerror", None) or "is not a readable image"
