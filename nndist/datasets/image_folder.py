"""A person's own labelled images: from class folders or a CSV, split, checked, and seen as networks need them.

FOLDER/train/<class>/*.jpg, FOLDER/test/<class>/*.jpg (or val, or all three)   split as it is
FOLDER/<class>/*.jpg                                                           a part of each class is the test set
FOLDER/**/*.jpg, and a CSV with columns for file, label and perhaps split      either
"""

from __future__ import annotations

import csv
import hashlib
import io
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nndist import machine
from nndist.data.config import DataConfig
from nndist.data.sets import ExampleRandom, permutation
from nndist.errors import UserError
from nndist.files import printable, read_bytes, read_json, write_json
from nndist.prediction.images import open_image, upright, why
from nndist.prediction.inputs import Inputs

from .imagenet import MAX_FILE_BYTES, TEXTURES, Pictures, Textures, middle, normalise

Augment = Literal["randaugment", "trivialaugment", "crop", "none"]
NUM_TEXTURES = (128, 64)
FULL_SIDE = 224
LOOKED_AT = 200  # images whose sizes choose the side
TEST_NAMES = ("test", "val", "valid", "validation")
FILE_COLUMNS, LABEL_COLUMNS = ("file", "filename", "file_name", "path", "image", "id"), ("label", "class", "target")


class Images:
    """Undecoded image files with their classes: `images[i]` is (name, the file's bytes, class).

    files: (path below the folder, class). An image that can't be opened raises UserError with its name.
    """

    def __init__(self, folder: Path, files: Sequence[tuple[str, int]]):
        self.folder, self.files = folder, files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[str, bytes, int]:
        name, label = self.files[number]
        path = self.folder / name
        try:
            return str(path), read_bytes(path, MAX_FILE_BYTES), label
        except OSError as error:
            raise UserError(f"{path}: can't be read ({error.strerror}); restore it and start again") from error

    @property
    def labels(self) -> list[int]:
        """The class of each image."""
        return [label for _, label in self.files]

    @property
    def fingerprint(self) -> str:
        """The CRC-32 of all names and classes."""
        return f"{zlib.crc32(chr(10).join(f'{name} {label}' for name, label in self.files).encode()):08x}"


class TextureImages(Images):
    """Generated textures, for a run without images."""

    def __init__(self, numbers: range):
        examples = Textures(numbers).examples
        self.examples = [(e.name, e.files["png"], int(e.files["cls"])) for e in examples]
        super().__init__(Path(), [(name, label) for name, _, label in self.examples])

    def __getitem__(self, number: int) -> tuple[str, bytes, int]:
        return self.examples[number]


@dataclass
class Found:
    """What `load` found: the sets train, test and perhaps val, the classes' names, and how networks see the images.

    side: pixels of the networks' input. whole: see See. plan, note: for Data.
    """

    sets: dict[str, Images]
    classes: list[str]
    side: int
    whole: bool
    source: str
    plan: dict[str, str] = field(default_factory=dict)
    note: str = ""


def load(
    config: DataConfig,
    folder: Path | None,
    labels: Path | None,
    test_share: float,
    broken: Literal["refuse", "skip"],
    side: int | None,
) -> Found:
    """The labelled images of a folder, split; generated textures if there is no folder.

    labels: CSV file. test_share: the part of each class that becomes the test set, where there is none. side: in
    pixels; None for a suitable one. Every image is decoded once, whose outcome is kept in the data folder; broken ones
    are left out or an error. Raises UserError.
    """
    if side is not None and side < 8:
        raise UserError(f"--side {side}: must be at least 8 pixels")
    if config.source not in ("auto", "sample"):
        raise UserError(f"--data-source {config.source}: it learns your images: name them with --images FOLDER")
    if folder is None:
        if labels is not None:
            raise UserError(f"--labels {labels}: name the folder of its images, too, with --images FOLDER")
        total = sum(NUM_TEXTURES)
        sets: dict[str, Images] = {
            "train": TextureImages(range(NUM_TEXTURES[0])),
            "test": TextureImages(range(NUM_TEXTURES[0], total)),
        }
        note = f"this run uses {total} generated textures; name your images with --images FOLDER"
        return Found(sets, list(TEXTURES), side or 32, True, "generated textures", note=note)
    if config.source == "sample":
        raise UserError(f"--images {folder}: give it or --data-source sample, not both")
    found = _split(config, folder.expanduser(), labels, test_share, broken)
    longest = longest_side(found.sets["train"])
    found.side = side or (FULL_SIDE if longest >= FULL_SIDE else -(-longest // 32) * 32)  # networks halve it five times
    found.whole = longest <= found.side
    return found


def _split(
    config: DataConfig, folder: Path, labels: Path | None, test_share: float, broken: Literal["refuse", "skip"]
) -> Found:
    """The images of a folder; their side is not known yet."""
    if not folder.is_dir():
        raise UserError(f"--images {folder}: is not a folder")
    found, classes = _listed(folder, labels)
    bad = broken_images(Images(folder, [file for files in found.values() for file in files]), config)
    plan = {}
    if bad:
        some = ", ".join(f"{printable(name)} ({reason})" for name, reason in list(bad.items())[:3])
        more = f" and {len(bad) - 3:,} more" if len(bad) > 3 else ""
        if broken == "refuse":
            raise UserError(
                f"--images {folder}: {len(bad):,} of its images can't be used: {some}{more}; replace or remove them, "
                "or leave them out by --broken skip"
            )
        found = {which: [file for file in files if file[0] not in bad] for which, files in found.items()}
        plan["skipped"] = f"{len(bad):,} broken: {some}{more}"
    if "test" not in found and "val" in found:
        found["test"] = found.pop("val")
    said = "as the folders are" if labels is None else f"as {labels.name} says"
    if "test" not in found:
        found["train"], found["test"] = stratified(found["train"], test_share)
        said = f"{test_share:.0%} of each class, chosen by its number, is the test set"
    for which, files in found.items():
        if not files:
            raise UserError(f"--images {folder}: the {which} set holds no images")
    counts = Counter(label for _, label in found["train"])
    if lacking := [name for number, name in enumerate(classes) if not counts[number]]:
        raise UserError(f"--images {folder}: class {printable(lacking[0])!r} has no training image")
    if len(classes) < 2:
        raise UserError(f"--images {folder}: has one class only, {printable(classes[0])!r}; a classifier needs two")
    plan = {"classes": _counts_text(classes, counts), "split": said, **plan}
    sets = {which: Images(folder, files) for which, files in found.items()}
    return Found(sets, classes, 0, True, f"images of {folder.absolute().name}", plan)


def _counts_text(classes: Sequence[str], counts: Mapping[int, int]) -> str:
    if len(classes) <= 6:
        return ", ".join(f"{printable(name)} {counts[number]:,}" for number, name in enumerate(classes))
    least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    return (
        f"{len(classes)} of {counts[least]:,} ({printable(classes[least])}) to {counts[most]:,} "
        f"({printable(classes[most])}) training images"
    )


def _listed(folder: Path, labels: Path | None) -> tuple[dict[str, list[tuple[str, int]]], list[str]]:
    """The files of each set that there is, and the classes' names."""
    if labels is not None:
        return _from_csv(folder, labels)
    if not (folder / "train").is_dir():
        pictures = Pictures(folder)
        return {"train": pictures.files}, pictures.classes
    train = Pictures(folder / "train")
    found = {"train": [(f"train/{name}", label) for name, label in train.files]}
    for place in TEST_NAMES:
        if (folder / place).is_dir():
            which = "test" if place == "test" else "val"
            others = Pictures(folder / place, train.classes)
            found.setdefault(which, []).extend((f"{place}/{name}", label) for name, label in others.files)
    return found, train.classes


def _from_csv(folder: Path, labels: Path) -> tuple[dict[str, list[tuple[str, int]]], list[str]]:
    """Files with the numbers of their classes, by set, and the names of the classes; raises UserError.

    labels: a CSV file whose first two columns are file and class if its header names no others. Files are in `folder`.
    """
    try:
        text = read_bytes(labels.expanduser(), MAX_FILE_BYTES).decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text), strict=True)
        numbered = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--labels {labels}: can't be read as CSV ({error})") from error
    rows = [row for _, row in numbered]
    if not rows or len(rows[0]) < 2:
        raise UserError(f"--labels {labels}: needs columns file and label")
    header = [cell.strip().lower() for cell in rows[0]]
    file, label = (
        next((header.index(name) for name in names if name in header), None) for names in (FILE_COLUMNS, LABEL_COLUMNS)
    )
    first = 1
    if file is None or label is None:
        # the names do not say which columns these are; the first line need not be a header either
        file, label = 0, 1
        first = 0 if (folder / rows[0][0]).is_file() else 1
    split = header.index("split") if "split" in header else None
    found: dict[str, list[tuple[str, str]]] = {}
    for number, row in numbered[first:]:
        if len(row) != len(rows[0]):
            raise UserError(f"--labels {labels}: line {number} has {len(row)} columns, the first has {len(rows[0])}")
        name = row[file].strip()
        if Path(name).is_absolute() or ".." in Path(name).parts or not (folder / name).is_file():
            raise UserError(f"--labels {labels}: line {number}: {printable(name)!r} is not a file in {folder}")
        which = row[split].strip().lower() if split is not None else "train"
        which = "val" if which in TEST_NAMES[1:] else which
        if which not in ("train", "val", "test"):
            raise UserError(f"--labels {labels}: line {number}: split {which!r} is none of train, val, test")
        found.setdefault(which, []).append((name, row[label].strip()))
    classes = sorted({name for files in found.values() for _, name in files})
    if "train" not in found:
        raise UserError(f"--labels {labels}: names no training image")
    numbers = {name: number for number, name in enumerate(classes)}
    return {which: [(file, numbers[name]) for file, name in files] for which, files in found.items()}, classes


def stratified(files: Sequence[tuple[str, int]], share: float) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """The files without and with a share of each class, which is drawn by its number and size alone; one stays."""
    chosen: set[int] = set()
    for label in sorted({label for _, label in files}):
        members = [number for number, (_, its) in enumerate(files) if its == label]
        count = min(max(1, round(share * len(members))), len(members) - 1)
        chosen |= {members[place] for place in permutation(len(members), label, -1)[:count].tolist()}
    return tuple([file for number, file in enumerate(files) if (number in chosen) is kept] for kept in (False, True))  # type: ignore[return-value]


def broken_images(images: Images, config: DataConfig) -> dict[str, str]:
    """The images that can't be decoded, with the reason; kept in the data folder until any file changes."""
    stats = []
    for name, _ in images.files:
        with suppress(OSError):
            about = (images.folder / name).stat()
            stats.append(f"{name} {about.st_size} {about.st_mtime_ns}")
    digest = hashlib.sha256("\n".join([str(images.folder.absolute()), *stats]).encode()).hexdigest()[:16]
    cache = config.directory / "checked_images" / f"{digest}.json"
    with suppress(OSError, ValueError):
        return dict(read_json(cache, {"broken": dict})["broken"])

    def reason(number: int) -> str:
        try:
            _, data, _ = images[number]
            with open_image(io.BytesIO(data)) as image:
                image.load()
        except UserError as error:
            return str(error)
        except Exception as error:  # Pillow's decoders raise what they like
            return why(error)
        return ""

    with ThreadPoolExecutor(machine.cores()) as pool:
        reasons = list(pool.map(reason, range(len(images)), chunksize=64))
    broken = {name: reason for (name, _), reason in zip(images.files, reasons, strict=True) if reason}
    if config.download:  # one process of each machine writes
        with suppress(OSError):
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(cache, {"broken": broken})
    return broken


def longest_side(images: Images) -> int:
    """The longest of the shorter sides of some of the images, in pixels."""
    shorter = []
    for number in range(0, len(images), -(-len(images) // LOOKED_AT)):
        with open_image(io.BytesIO(images[number][1])) as image:
            shorter.append(min(image.size))
    return max(shorter)


class See:
    """Decodes an example to uint8 [side, side, 3] and its class: as evaluations see it or, given randomness, augmented.

    whole: the image's shorter side is scaled to `side`, and nothing cut off that; else evaluations see the centre as
    ImageNet's do. The transforms are torchvision's, and draw from torch's generator, which is seeded by example.
    """

    def __init__(self, side: int, *, whole: bool, augment: Augment, flip: bool):
        self.side, self.whole, self.augment, self.flip = side, whole, augment, flip
        self.transform: Any = None

    def __call__(self, example: tuple[str, bytes, int], random: ExampleRandom | None) -> tuple[Tensor, int]:
        name, data, label = example
        try:
            with open_image(io.BytesIO(data)) as opened:
                image = upright(opened).convert("RGB")
        except Exception as error:
            raise UserError(f"{printable(name)}: {why(error)}; replace or remove it") from error
        if random is None or (self.augment == "none" and not self.flip):
            image = scaled(image, self.side, self.whole)
        else:
            self.transform = self.transform or self.training()
            image = self.transform(image)
        return torch.from_numpy(np.array(image)), label

    def training(self) -> Any:
        """torchvision's transform of a training image."""
        from torchvision.transforms import v2

        steps: list[Any] = []
        if self.augment == "none":
            steps.append(v2.Lambda(lambda image: scaled(image, self.side, self.whole)))
        elif self.whole:
            steps.append(v2.Lambda(lambda image: scaled(image, self.side, True)))
            steps.append(v2.RandomCrop(self.side, padding=max(1, self.side // 8), padding_mode="edge"))
        else:
            steps.append(v2.RandomResizedCrop(self.side, antialias=True))
        if self.flip:
            steps.append(v2.RandomHorizontalFlip())
        steps += {"randaugment": [v2.RandAugment()], "trivialaugment": [v2.TrivialAugmentWide()]}.get(self.augment, [])
        return v2.Compose(steps)


def scaled(image: Any, side: int, whole: bool) -> Any:
    """The square of a PIL image that evaluations see."""
    if not whole:
        return middle(image, side)
    from PIL import ImageOps

    return ImageOps.fit(image, (side, side))


def seen(inputs: Inputs, side: int, whole: bool) -> Tensor:
    """A person's images, prepared as in evaluations, float [k, 3, side, side]."""

    def see(image: Any) -> tuple[Tensor, str]:
        text = f"{image.width}x{image.height} scaled"
        return torch.from_numpy(np.array(scaled(image.convert("RGB"), side, whole))), text

    images = inputs.images(see)
    return normalise((images, images))[0]


def balanced_weights(labels: Sequence[int], num_classes: int) -> list[float]:
    """Weights of the classes by which each counts as much as any other; their mean over the examples is 1."""
    counts = Counter(labels)
    return [len(labels) / (num_classes * counts[number]) for number in range(num_classes)]


def classifier(name: str, num_classes: int, side: int) -> torch.nn.Module:
    """One of torchvision's classifiers, newly initialised; raises UserError for another name or an unsuitable side."""
    import difflib

    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
        raise UserError(f"--network {name}: torchvision has no classifier of that name{hint}")
    options: dict[str, Any] = {"image_size": side} if name.startswith("vit_") else {}
    options |= {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    try:
        return models.get_model(name, weights=None, num_classes=num_classes, **options)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"--network {name}: can't be built for --side {side} ({error}); give another side") from error
