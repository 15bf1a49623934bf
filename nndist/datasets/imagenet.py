"""Labelled photographs, such as ImageNet: from class folders or shards of them; generated textures offline.

The folder has torchvision's layout, `train/<class>/*.JPEG` and `val/<class>/*.JPEG`; `nndist shard` makes shards of
it. ImageNet: Russakovsky et al. 2015, https://arxiv.org/abs/1409.0575; its licence rules out downloading it here.
"""

import contextlib
import io
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nndist.data.config import DataConfig
from nndist.data.examples import Collate
from nndist.data.sets import Data, Decode, ExampleRandom, ExampleSet, Streamed, Tensors
from nndist.data.shard_store import Shard
from nndist.data.shards import Example, Sharded, write_shards
from nndist.datasets.encoded import Photograph, View, collated, photograph
from nndist.errors import UserError, first_line
from nndist.files import printable, read_bytes
from nndist.prediction.images import BadImage, open_image
from nndist.prediction.inputs import Inputs
from nndist.stores import plain_urls

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels from 0 to 1, as torchvision has them
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}
CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
TEXTURES = ("stripes", "diagonals", "checks", "dots", "rings", "spokes", "clouds", "noise")
TEXTURE_SIDE, TEXTURE_CROP, NUM_TRAIN_TEXTURES, NUM_TEST_TEXTURES = 24, 16, 128, 64
FULL_SIDE = 224
MAX_FILE_BYTES = 1 << 28  # of an image


class Pictures:
    """The undecoded image files of a folder of classes, sorted by name.

    Raises UserError if the folder can't be read, holds no image, or has a class that is not in `classes`.
    """

    def __init__(self, folder: Path, classes: Sequence[str] | None = None):
        self.folder = folder
        try:
            found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
            self.classes = list(classes) if classes is not None else found
            numbers = {name: number for number, name in enumerate(self.classes)}
            if unknown := [name for name in found if name not in numbers]:
                raise UserError(
                    f"{folder}: class {unknown[0]!r} is not a class of the training images; move or remove it"
                )
            self.files = [
                (f"{name}/{file}", numbers[name])
                for name in found
                for file in sorted(entry.name for entry in os.scandir(folder / name))
                if Path(file).suffix.lower() in SUFFIXES
            ]
        except OSError as error:
            raise UserError(
                f"{error.filename}: can't be read ({error.strerror}); the layout is train/<class>/*.JPEG and "
                "val/<class>/*.JPEG"
            ) from error
        if not self.files:
            raise UserError(f"{folder}: holds no images; the layout is {folder.name}/<class>/*.JPEG")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Example:
        name, label = self.files[number]
        path = self.folder / name
        try:
            return Example(
                str(path), {path.suffix[1:].lower(): read_bytes(path, MAX_FILE_BYTES), "cls": str(label).encode()}
            )
        except OSError as error:
            raise UserError(f"{path}: can't be read ({error.strerror}); restore it and start again") from error

    @property
    def fingerprint(self) -> str:
        """The CRC-32 of all names."""
        return f"{zlib.crc32(os.linesep.join(name for name, _ in self.files).encode()):08x}"


class Textures:
    """Generated pictures: example i, of class i modulo 8, is a pure function of i, with random colours and scale."""

    def __init__(self, numbers: range):
        self.examples = [texture(number) for number in numbers]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> Example:
        return self.examples[number]


def texture(number: int) -> Example:
    """A generated picture as a square PNG file of TEXTURE_SIDE pixels, and its class."""
    from PIL import Image

    draw = np.random.Generator(np.random.PCG64(number))
    side = TEXTURE_SIDE
    y, x = np.mgrid[0:side, 0:side] / side
    kind = number % len(TEXTURES)
    waves = 2 * math.pi * draw.uniform(3, 5)
    shift_x, shift_y = draw.uniform(0, 1, 2)
    along, across = np.sin(waves * (x + shift_x)), np.sin(waves * (y + shift_y))
    u, v = x - draw.uniform(0.3, 0.7), y - draw.uniform(0.3, 0.7)
    if kind == 0:
        level = along if draw.random() < 0.5 else across
    elif kind == 1:
        level = np.sin(waves * (x + (y if draw.random() < 0.5 else -y) + shift_x))
    elif kind == 2:
        level = np.sign(along * across)
    elif kind == 3:
        level = np.where(along + across > 1.0, 1.0, -1.0)
    elif kind == 4:
        level = np.sin(2 * waves * np.hypot(u, v))
    elif kind == 5:
        level = np.sin(6 * np.arctan2(v, u) + waves)
    elif kind == 6:
        level = np.kron(draw.uniform(-1, 1, (4, 4)), np.ones((side // 4, side // 4)))
    else:
        level = draw.uniform(-1, 1, (side, side))
    dark, light = draw.uniform(0, 110, 3), draw.uniform(145, 255, 3)
    pixels = dark + (light - dark) * (0.5 + 0.5 * level)[..., None] + draw.normal(0, 8, (side, side, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "png")
    return Example(f"generated texture {number}", {"png": file.getvalue(), "cls": str(kind).encode()})


def decode(
    example: Example, random: ExampleRandom | None, *, side: int, num_classes: int | None = None
) -> tuple[Tensor, int]:
    """An example as uint8 [side, side, 3] and its class; in training a random crop, mirrored at random.

    Otherwise the centre crop after scaling the shorter side to 256/224 of `side`. Raises UserError, naming the file, if
    it is not an image, too large, or has no class below `num_classes`.
    """
    from PIL import Image

    with _opened(example) as (_, opened):
        label = _label(example, num_classes)
        image = opened.convert("RGB")
    view = view_of(image.size, side, random)
    left, top, width, height = view.part
    image = image.crop((left, top, left + width, top + height)).resize(view.size, Image.Resampling.BILINEAR)
    left, top = view.corner
    image = image.crop((left, top, left + side, top + side))
    if view.mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)), label


def undecoded(
    example: Example, random: ExampleRandom | None, *, side: int, num_classes: int | None = None
) -> tuple[Photograph, int]:
    """The same example for the device to decode (see nndist.datasets.encoded), and its class; raises UserError too."""
    with _opened(example) as (data, opened):
        label = _label(example, num_classes)
        view = view_of(opened.size, side, random)
        return photograph(example.name, data, opened, view), label


@contextlib.contextmanager
def _opened(example: Example) -> Iterator[tuple[bytes, Any]]:
    """Context manager: the file's bytes and its image; what goes wrong meanwhile is a UserError that names the file."""
    try:
        (data,) = (data for kind, data in example.files.items() if f".{kind}" in SUFFIXES)
        with open_image(io.BytesIO(data)) as opened:
            yield data, opened
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise what they like
        reason = str(error) if isinstance(error, BadImage) else f"is not a readable image ({first_line(error)})"
        raise UserError(f"{printable(example.name)}: {reason}; replace or remove it") from error


def view_of(of_image: tuple[int, int], side: int, random: ExampleRandom | None) -> View:
    """What is seen of an image of this width and height: in training a random part, maybe mirrored, else its middle."""
    width, height = of_image
    if random is None:
        size, corner = middle_of(width, height, side)
        return View((0, 0, width, height), size, corner, False)
    drawn = random.uniform(1 + 4 * CROP_ATTEMPTS)[0].tolist()
    left, top, right, bottom = random_part(width, height, drawn[1:])
    return View((left, top, right - left, bottom - top), (side, side), (0, 0), drawn[0] < 0.5)


def _label(example: Example, num_classes: int | None) -> int:
    """The class in an example's .cls file; raises UserError if it is missing or invalid."""
    text = example.files.get("cls")
    if text is None:
        raise UserError(f"{printable(example.name)}: has no class, a file called .cls; recreate the shards")
    if not re.fullmatch(rb"\s*\d{1,9}\s*", text):
        shown = printable(text[:20].decode("ascii", "replace"))
        raise UserError(f"{printable(example.name)}: class {shown} is not a number; recreate the shards")
    if num_classes is not None and int(text) >= num_classes:
        raise UserError(
            f"{printable(example.name)}: class {int(text)}, but the shards' index names {num_classes} classes; "
            "recreate the shards"
        )
    return int(text)


def middle(image: Any, side: int) -> Any:
    """The centre crop of a PIL image, after scaling its shorter side to 256/224 of `side`."""
    from PIL import Image

    size, (left, top) = middle_of(image.width, image.height, side)
    return image.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + side, top + side))


def middle_of(width: int, height: int, side: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size to scale an image to, and the left and top of its centre crop."""
    scale = round(side * 256 / 224) / min(width, height)
    width, height = max(side, round(scale * width)), max(side, round(scale * height))
    return (width, height), ((width - side) // 2, (height - side) // 2)


def photographs(inputs: Inputs, side: int | None) -> Tensor:
    """A person's images, prepared as in evaluations, float [k, 3, side, side]."""
    seen = side or (TEXTURE_CROP if tuple(inputs.classes) == TEXTURES else FULL_SIDE)

    def see(image: Any) -> tuple[Tensor, str]:
        return torch.from_numpy(np.array(middle(image.convert("RGB"), seen))), f"{image.width}x{image.height} scaled"

    images = inputs.images(see)
    return normalise((images, images))[0]


def random_part(width: int, height: int, drawn: Sequence[float]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random crop, with an area in CROP_AREA and an aspect ratio in CROP_RATIO.

    `drawn`: numbers in [0, 1), four per attempt; if no attempt fits, the centre is taken (Szegedy et al. 2015, as in
    torchvision's RandomResizedCrop).
    """
    low, high = map(math.log, CROP_RATIO)
    for area, ratio, across, down in zip(*(drawn[i::4] for i in range(4)), strict=True):
        pixels = width * height * (CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * area)
        shape = math.exp(low + (high - low) * ratio)
        w, h = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * CROP_RATIO[1])))
    h = min(height, max(1, round(width / CROP_RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def normalise(batch: Tensors) -> Tensors:
    """[k, side, side, 3] from 0 to 255, ... -> float [k, 3, side, side], as torchvision's networks expect it, ..."""
    images, *rest = batch
    mean, std = (torch.tensor(values, device=images.device).mul(255).view(3, 1, 1) for values in (MEAN, STD))
    return images.permute(0, 3, 1, 2).float().sub(mean).div(std), *rest


def imagenet(
    config: DataConfig,
    *,
    images: Path | None,
    shards: str | None,
    side: int | None,
    window: int,
    decode_on: Literal["workers", "device"] = "workers",
) -> Data:
    """Training and validation images of a folder or of shards; by default the folder `imagenet` in the data folder.

    If that is missing, generated textures are used instead, and a note says so. `side`: pixels of the network's input
    (None: FULL_SIDE, for textures TEXTURE_CROP). `decode_on`: where files become pixels. Raises UserError as Pictures
    and Sharded do.
    """
    if shards is not None and images is not None:
        raise UserError(f"--shards {plain_urls(shards)}: give it or --images, not both")
    for flag, given in (("--images", images), ("--shards", shards)):
        if given is not None and config.source == "sample":
            raise UserError(f"{flag} {plain_urls(str(given))}: give it or --data-source sample, not both")
    if config.source not in ("auto", "sample"):
        raise UserError(f"--data-source {config.source}: this recipe learns images; name them with --images FOLDER")
    if side is not None and side < 8:
        raise UserError(f"--side {side}: must be at least 8 pixels")
    if window < 1:
        raise UserError(f"--window {window}: must be at least 1 shard")
    reader = undecoded if decode_on == "device" else decode
    seen, collate = partial(reader, side=side or FULL_SIDE), _collate(decode_on, side or FULL_SIDE)
    train: ExampleSet
    test: ExampleSet
    if shards is not None:
        train, test = (_sharded(config, shards, name, seen, collate, window) for name in ("train", "val"))
        if train.index.classes != test.index.classes:
            raise UserError(
                f"--shards {plain_urls(shards)}: train.json and val.json name different classes; recreate both"
            )
        return Data(train, test, f"shards of {Path(plain_urls(shards)).name}", normalise, classes=train.index.classes)
    folder = Path(images).expanduser() if images is not None else config.directory / "imagenet"
    if images is not None or (config.source == "auto" and folder.exists()):
        pictures = Pictures(folder / "train")
        others = Pictures(folder / "val", pictures.classes)
        train, test = (Streamed(found, config.num_workers, seen, collate) for found in (pictures, others))
        return Data(train, test, f"images of {folder.name}", normalise, classes=pictures.classes)
    seen, collate = partial(reader, side=side or TEXTURE_CROP), _collate(decode_on, side or TEXTURE_CROP)
    total = NUM_TRAIN_TEXTURES + NUM_TEST_TEXTURES
    train = Streamed(Textures(range(NUM_TRAIN_TEXTURES)), 0, seen, collate)
    test = Streamed(Textures(range(NUM_TRAIN_TEXTURES, total)), 0, seen, collate)
    note = (
        f"no images in {folder}: this run uses {total} generated textures; name images with --images FOLDER or --shards"
    )
    return Data(train, test, "generated textures", normalise, classes=TEXTURES, note=note)


def _collate(decode_on: str, side: int) -> Collate | None:
    return partial(collated, side=side) if decode_on == "device" else None


def _sharded(config: DataConfig, place: str, name: str, seen: Decode, collate: Collate | None, window: int) -> Sharded:
    found = Sharded(
        place,
        name,
        seen,
        num_workers=config.num_workers,
        window=window,
        cache=config.directory / "shards",
        cache_bytes=config.cache_bytes,
    )
    found.decode = partial(seen, num_classes=len(found.index.classes))  # type: ignore[call-arg]
    found.collate = collate
    return found


def shard_folder(folder: Path, out: Path, *, shard_bytes: int, seed: int = 0, progress: bool = True) -> list[Shard]:
    """Write the image files of a folder's `train` and `val`, unchanged, to shards in `out`; returns all shards.

    Raises UserError as Pictures and write_shards do.
    """
    train = Pictures(folder / "train")
    val = Pictures(folder / "val", train.classes)
    shards = []
    for name, pictures in (("train", train), ("val", val)):
        examples = [_files_of(pictures, number) for number in range(len(pictures))]
        shards += write_shards(
            out, name, train.classes, examples, shard_bytes=shard_bytes, seed=seed, progress=progress
        )
    return shards


def _files_of(pictures: Pictures, number: int) -> Callable[[], dict[str, bytes]]:
    return lambda: pictures[number].files
