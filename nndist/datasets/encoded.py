"""Photographs decoded on the device: workers read files and draw crops, the device decodes, crops and scales.

On a CUDA GPU torchvision decodes JPEG files with nvJPEG. What is drawn for an example is what its worker would draw for
`imagenet.decode`; pixels differ by a decoder's and a filter's rounding, on a CPU by less than a grey level on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nndist.data.transfer import stream_of
from nndist.errors import UserError, first_line
from nndist.files import printable


class View(NamedTuple):
    """What of a photograph is seen, in pixels: a part of it, scaled to a size, then a square of that; maybe mirrored.

    part: left, top, width, height. size: width, height. corner: left, top of the square.
    """

    part: tuple[int, int, int, int]
    size: tuple[int, int]
    corner: tuple[int, int]
    mirrored: bool


class Photograph(NamedTuple):
    """A file as it is, or the pixels of one that nvJPEG does not read, uint8 [height, width, 3] in bytes.

    shape: of the pixels; () for a JPEG file.
    """

    name: str
    data: bytes
    shape: tuple[int, ...]
    view: View


def photograph(name: str, data: bytes, image: Any, view: View) -> Photograph:
    """One example of a batch. image: as Pillow opened it, not yet decoded unless it must be."""
    if image.format == "JPEG" and image.mode in ("RGB", "L"):
        return Photograph(name, data, (), view)
    pixels = np.asarray(image.convert("RGB"))
    return Photograph(name, pixels.tobytes(), pixels.shape, view)


class Photographs:
    """A batch of photographs in one buffer; `to` makes images of them on a device, uint8 [k, side, side, 3]."""

    def __init__(self, examples: Sequence[Photograph], side: int):
        self.side = side
        self.names = [example.name for example in examples]
        self.shapes = [example.shape for example in examples]
        self.views = [example.view for example in examples]
        self.lengths = [len(example.data) for example in examples]
        # one tensor: each that a worker sends takes one of the open files that a process may have
        self.data = torch.frombuffer(bytearray().join(example.data for example in examples), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device) -> Tensor:
        """Decodes them on `device`; raises UserError, naming the file, for one that can't be decoded."""
        if device.type != "cuda":  # Apple's GPUs decode no JPEG
            return self.images(torch.device("cpu")).to(device)
        # A stream, and so memory, that nothing else uses: torchvision writes to new memory without waiting for those
        # that still read what it held before (pytorch/vision#9606). Its own work of the batch before is over by now.
        stream, current = stream_of(device, "decoding"), torch.cuda.current_stream(device)
        stream.synchronize()
        with torch.cuda.stream(stream):
            images = self.images(device)
        current.wait_stream(stream)
        images.record_stream(current)
        return images.clone()

    def images(self, device: torch.device) -> Tensor:
        """The photographs, decoded and seen on `device`, uint8 [k, side, side, 3]."""
        parts = self.data.split(self.lengths)
        files = [number for number, shape in enumerate(self.shapes) if not shape]
        decoded = dict(zip(files, self._decoded(files, [parts[number] for number in files], device), strict=True))
        for number, shape in enumerate(self.shapes):
            if shape:
                decoded[number] = parts[number].view(shape).to(device).permute(2, 0, 1)
        return torch.stack([seen(decoded[number], view, self.side) for number, view in enumerate(self.views)])

    def _decoded(self, numbers: Sequence[int], files: list[Tensor], device: torch.device) -> Sequence[Tensor]:
        """uint8 [3, height, width] for each JPEG file."""
        from torchvision.io import ImageReadMode, decode_jpeg

        try:
            return decode_jpeg(files, ImageReadMode.RGB, device=device) if files else []
        except RuntimeError:  # which of them?
            for number, file in zip(numbers, files, strict=True):
                try:
                    decode_jpeg(file, ImageReadMode.RGB, device=device)
                except RuntimeError as error:
                    raise UserError(
                        f"{printable(self.names[number])}: is not a readable image ({first_line(error)}); replace or "
                        "remove it"
                    ) from error
            raise


def collated(examples: list[tuple[Photograph, int]], side: int) -> tuple[Photographs, Tensor]:
    """A batch of photographs and their classes."""
    return Photographs([example for example, _ in examples], side), torch.tensor([label for _, label in examples])


def seen(image: Tensor, view: View, side: int) -> Tensor:
    """A view of an image, uint8 [3, height, width] -> [side, side, 3]."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    left, top, width, height = view.part
    image = image[:, top : top + height, left : left + width]
    width, height = view.size
    image = functional.resize(image, [height, width], interpolation=InterpolationMode.BILINEAR, antialias=True)
    left, top = view.corner
    image = image[:, top : top + side, left : left + side]
    return (image.flip(2) if view.mirrored else image).permute(1, 2, 0)
