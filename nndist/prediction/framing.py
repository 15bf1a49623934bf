"""How images of a data set are framed, so that a person's images can be framed the same way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image


MAX_SCALED_PIXELS = 8_000_000  # an image of four times as many is first reduced by a whole factor
Ends = tuple[tuple[float, ...], tuple[float, ...]]
"""The values of black and of white, per colour."""


@dataclass(frozen=True)
class Framing:
    """How the images of a data set are framed, so that others can be framed the same way.

    height, width: pixels. layout: "hw", "hwc" or "chw". background: 0 or 255 for drawings on black or white, None for
    photographs. box: longer side of the bounding box of what is drawn. centre: row and column of its centre of mass, if
    the set's images agree on it (MNIST's do); else the box is centred. ends: the values of black and white per colour,
    for photographs that were normalised before they became tensors; None if they are 0 and 1, or 0 and 255.
    """

    height: int
    width: int
    layout: str
    background: int | None = None
    box: int = 0
    centre: tuple[float, float] | None = None
    ends: Ends | None = None

    def values(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 images from `stored`, in the value range of the set's tensors: 0 to 255, 0 to 1, or `ends`."""
        if not dtype.is_floating_point:
            return images.to(dtype)
        if self.ends is None:
            return images.to(dtype) / 255
        shape = (3, 1, 1) if self.layout == "chw" else (3,)
        black, white = (torch.tensor(end, device=images.device).view(shape) for end in self.ends)
        return (images / 255 * (white - black) + black).to(dtype)

    def see(self, image: Image) -> tuple[Tensor, str]:
        """An image in this framing, uint8 [h, w] or [h, w, 3], and what was done to it."""
        import numpy as np

        size, done = image.size, []
        if image.mode.startswith(("I", "F")):  # 16 bits or more
            values = np.asarray(image, dtype=np.float32)
            pixels = 255 * (values - values.min()) / max(1e-6, float(np.ptp(values)))
        else:
            image = image.convert("L" if self.layout == "hw" else "RGB")
            if (factor := math.isqrt(math.prod(size) // MAX_SCALED_PIXELS)) > 1:
                image = image.reduce(factor)  # as floats, all pixels would take several times the memory
            pixels = np.asarray(image, dtype=np.float32)
        if self.layout == "hw" and pixels.ndim == 2 and self.background is not None:
            edge = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]))
            if (edge > 127) != (self.background > 127):
                pixels = 255 - pixels
                done.append("inverted")
        if size != (self.width, self.height):
            done.insert(0, f"{size[0]}x{size[1]} scaled")
            drawn = self._laid(pixels) if self.layout == "hw" and self.background is not None else None
            pixels = drawn if drawn is not None else self._fitted(pixels)
        if self.ends is not None:
            black, white = (min(self.ends[0]), max(self.ends[1]))
            done.append(f"values from {black:.3g} to {white:.3g}")
        return torch.from_numpy(pixels.round().clip(0, 255).astype("uint8")), ", ".join(done)

    def _fitted(self, pixels: Any) -> Any:
        """A picture scaled into the frame, its proportions kept; margins get the colour of its edge."""
        import numpy as np

        scale = min(self.height / pixels.shape[0], self.width / pixels.shape[1])
        height, width = (max(1, round(scale * length)) for length in pixels.shape[:2])
        edge = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
        frame = np.empty((self.height, self.width, *pixels.shape[2:]), dtype=np.float32)
        frame[:] = edge
        top, left = (self.height - height) // 2, (self.width - width) // 2
        frame[top : top + height, left : left + width] = _resized(pixels, height, width)
        return frame

    def _laid(self, pixels: Any) -> Any:
        """A drawing, cropped, scaled to the box and placed as in the set; None if it is empty.

        Photographed paper is not uniformly bright: what differs little from the edge counts as paper.
        """
        import numpy as np

        ink = pixels if self.background == 0 else 255 - pixels
        paper = float(np.median(np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])))
        darkest = float(np.quantile(ink, 0.995)) if ink.size > 2000 else float(ink.max())
        darkest = max(darkest, paper + 0.5 * (float(ink.max()) - paper))
        if darkest - paper < 24:
            return None
        ink = ((ink - paper) / (darkest - paper)).clip(0, 1)
        ink[ink < 0.2] = 0
        rows, columns = np.nonzero((ink > 0.5).any(1))[0], np.nonzero((ink > 0.5).any(0))[0]
        ink = ink[max(0, rows[0] - 1) : rows[-1] + 2, max(0, columns[0] - 1) : columns[-1] + 2]
        scale = self.box / max(ink.shape)
        height, width = (max(1, round(scale * length)) for length in ink.shape)
        ink = _resized(255 * ink, height, width).clip(0, 255)
        top, left = (self.height - height) / 2, (self.width - width) / 2
        if self.centre is not None and ink.sum() > 0:
            top = self.centre[0] - float((ink.sum(1) * np.arange(height)).sum() / ink.sum())
            left = self.centre[1] - float((ink.sum(0) * np.arange(width)).sum() / ink.sum())
        top = min(max(0, round(top)), self.height - height)
        left = min(max(0, round(left)), self.width - width)
        frame = np.zeros((self.height, self.width), dtype=np.float32)
        frame[top : top + height, left : left + width] = ink
        return frame if self.background == 0 else 255 - frame

    def stored(self, images: Tensor) -> Tensor:
        """Images [k, h, w] or [k, h, w, 3] in the layout of the set's tensors."""
        return images.permute(0, 3, 1, 2) if self.layout == "chw" and images.dim() == 4 else images


def framing_of(images: Tensor) -> Framing | None:
    """The framing of a data set, given its first raw tensor; None if that does not hold images.

    uint8, or float from 0 to 1: [n, h, w], [n, h, w, 3] or [n, 3, h, w]. With three colours, floats may be normalised
    if the normalisation can be inferred (see `ends_of`); raises UserError if it can't.
    """
    shape = images.shape[1:]
    if len(shape) == 3 and 3 in (shape[0], shape[2]) and images.is_floating_point():
        layout = "chw" if shape[0] == 3 else "hwc"
        height, width = shape[1:] if layout == "chw" else shape[:2]
        if min(height, width) < 8:
            return None
        colours = images.transpose(0, 1) if layout == "chw" else images.movedim(3, 0)
        low, high = (end.tolist() for end in torch.aminmax(colours.flatten(1), dim=1))
        is_plain = min(low) >= 0 and max(high) <= 1 and max(high) > 0.5
        return Framing(int(height), int(width), layout, ends=None if is_plain else ends_of(colours.flatten(1)))
    if images.is_floating_point() and (images.min() < 0 or images.max() > 1 or images.max() < 0.5):
        return None
    if not (images.is_floating_point() or images.dtype == torch.uint8) or len(shape) not in (2, 3):
        return None
    if len(shape) == 3:
        layout = "hwc" if shape[2] == 3 else "chw" if shape[0] == 3 else ""
        sides = shape[:2] if layout == "hwc" else shape[1:]
        return Framing(int(sides[0]), int(sides[1]), layout) if layout and min(sides) >= 8 else None
    if min(shape) < 8:
        return None
    height, width = map(int, shape)
    values = images.float() * (255 if images.is_floating_point() else 1)
    ring = torch.cat([values[:, 0], values[:, -1], values[:, :, 0], values[:, :, -1]], 1)
    background = next((level for level in (0, 255) if ((ring - level).abs() < 32).float().mean() > 0.6), None)
    if background is None:
        return Framing(height, width, "hw")
    ink = values if background == 0 else 255 - values
    drawn = ink > 16
    sides_of = []
    for axis in (2, 1):
        present = drawn.any(axis).float()  # [n, h] or [n, w]
        places = torch.arange(1, present.shape[1] + 1)
        last = (present * places).amax(1)
        first = (present * places.flip(0)).amax(1)
        sides_of.append(last - (present.shape[1] - first))
    box = int(torch.stack(sides_of).amax(0).median())
    mass = ink.sum((1, 2)).clamp_min(1)
    centres = torch.stack(
        [(ink.sum(2) * torch.arange(height)).sum(1) / mass, (ink.sum(1) * torch.arange(width)).sum(1) / mass]
    )
    middle = centres.median(1).values
    agree = float((centres - middle.unsqueeze(1)).abs().median()) < 0.5
    return Framing(height, width, "hw", background, box, (float(middle[0]), float(middle[1])) if agree else None)


MOST_VALUES = 1_000_000  # per colour, from which its levels are inferred
NORMALISATIONS = (
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's
    ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),  # CIFAR-10's
    ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),  # as often used for CIFAR-10
)
"""The usual normalisations: mean and standard deviation per colour, of values from 0 to 1."""


def ends_of(colours: Tensor) -> Ends:
    """The values of black and white, inferred from the values of normalised photographs, float [3, n].

    That is possible if they fill the range of a usual normalisation, or if each colour has the 256 levels of a byte,
    the first being black and the last white. Raises UserError otherwise.
    """
    ends = torch.stack(torch.aminmax(colours, dim=1), 1)  # [3, 2]
    low, high = ends.double().unbind(1)
    found: list[tuple[float, Ends]] = []
    for mean, std in NORMALISATIONS:
        black, white = ((end - torch.tensor(mean).double()) / torch.tensor(std) for end in (0, 1))
        gaps = torch.stack([low - black, white - high]) / (white - black)
        if float(gaps.min()) > -1e-3 and float(gaps.max()) < 0.05:
            found.append((float(gaps.sum()), (tuple(black.tolist()), tuple(white.tolist()))))
    if found:
        return min(found)[1]
    some = colours[:, :: max(1, colours.shape[1] // MOST_VALUES)]
    for values in map(torch.unique, torch.cat([some, ends], 1)):
        steps = values.double().diff()
        spans = steps / steps.min() if len(values) > 1 else steps
        levels = float(spans.sum())
        if len(values) > 256 or not 253.5 < levels < 255.5 or float((spans - spans.round()).abs().max()) > 0.05:
            raise UserError(
                "its images were normalised before they became examples, in a way that can't be inferred; store them "
                "as bytes, or from 0 to 1, and normalise in Data(prepare=...), or define predict() in the recipe"
            )
    return tuple(low.tolist()), tuple(high.tolist())


def _resized(pixels: Any, height: int, width: int) -> Any:
    """Pixels, float [h, w] or [h, w, 3], scaled; with antialiasing when shrinking."""
    import numpy as np
    from PIL import Image

    planes = pixels[..., None] if pixels.ndim == 2 else pixels
    scaled = [
        np.asarray(Image.fromarray(plane.astype("float32")).resize((width, height), Image.Resampling.BICUBIC))
        for plane in np.moveaxis(planes, -1, 0)
    ]
    return scaled[0] if pixels.ndim == 2 else np.stack(scaled, -1)
