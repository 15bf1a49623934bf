"""Image files of strangers: only formats that are decoded here, and none that would outgrow the memory.

Pillow opens whatever it knows by its content, whatever the file is called: an EPS named x.png would start Ghostscript.
A small file may also say that it has any number of pixels, which are in memory as soon as they are decoded.
"""

from __future__ import annotations

import warnings
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM", "GIF")
MAX_PIXELS = 100_000_000
MAX_PROPORTION = 100  # the longer side to the shorter: scaled by the shorter, the longer would grow as much


class BadImage(ValueError):
    """An image that is not opened: the message says why, without the file's name."""


def open_image(source: str | Any | IO[bytes]) -> Image:
    """Opens an image and has it checked before anything of it is decoded; to be used in a `with` statement.

    source: a path, or an open file. Raises BadImage for pixels or proportions beyond the bounds, and what Pillow raises
    for what is no image of FORMATS.
    """
    from PIL import Image

    if not set(FORMATS) <= set(Image.OPEN):
        Image.init()  # it knows a few formats only before that
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bounds are these ones
        image = Image.open(source, formats=[name for name in FORMATS if name in Image.OPEN])  # it may lack a library
    try:
        check_size(*image.size)
    except BadImage:
        image.close()
        raise
    return image


def check_size(width: int, height: int) -> None:
    """Raises BadImage where an image has no pixels, too many, or is too long and narrow."""
    if not (width > 0 and height > 0):
        raise BadImage(f"has {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise BadImage(
            f"has {width:,} x {height:,} pixels, and at most {MAX_PIXELS / 1e6:g} million are read; scale it"
        )
    if max(width, height) > MAX_PROPORTION * min(width, height):
        raise BadImage(f"has {width:,} x {height:,} pixels, longer than {MAX_PROPORTION} times its breadth; cut it")


def why(error: Exception) -> str:
    """What is wrong with an image, for a person."""
    if isinstance(error, BadImage):
        return str(error)
    return getattr(error, "strerror", None) or "is no image that can be read"
