"""MNIST, Fashion-MNIST and KMNIST from IDX files, downloaded when missing; an embedded sample of MNIST offline.

MNIST: LeCun et al. 1998, https://doi.org/10.1109/5.726791. Fashion-MNIST: https://arxiv.org/abs/1708.07747.
KMNIST: https://arxiv.org/abs/1812.01718. The embedded sample is described in mnist_sample.md.
"""

import gzip
import hashlib
import math
import os
import queue
import threading
import time
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from nndist.data.config import DataConfig
from nndist.data.sets import Data, ExampleSet, Resident, Tensors
from nndist.errors import UserError
from nndist.files import open_regular, write_whole
from nndist.progress import bar

READ_TIMEOUT_SECONDS = 10.0
# Two mirrors that drop packets cost twice this before the sample is used instead.
OPEN_TIMEOUT_SECONDS = 6.0
DOWNLOAD_DEADLINE_SECONDS = 300.0
MAX_BYTES = 256 << 20  # of a file, unzipped; the largest of these sets has 47 MB

SAMPLE_IMAGES_PATH = Path(__file__).with_name("mnist_sample.png")
SAMPLE_LABELS_PATH = Path(__file__).with_name("mnist_sample_labels.txt")
SAMPLE_TILES = (50, 100)  # rows, columns of 28x28 tiles
SAMPLE_NUM_TRAIN = 4000

DIGIT_NAMES = tuple("0123456789")


@dataclass(frozen=True)
class Archive:
    """A data set in torchvision's layout; `folder` is also the name of torchvision's class."""

    name: str
    folder: str
    classes: tuple[str, ...]


ARCHIVES = {
    "mnist": Archive("MNIST", "MNIST", DIGIT_NAMES),
    "fashion-mnist": Archive(
        "Fashion-MNIST",
        "FashionMNIST",
        ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "kmnist": Archive("KMNIST", "KMNIST", ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")),
}
SOURCES = ("auto", *ARCHIVES, "sample")


class UnavailableError(Exception):
    """The files are missing and could not be downloaded; the message is the reason."""


@dataclass(frozen=True)
class Digits:
    """Ten classes of 28x28 grey-scale images; 0 is background and 255 is ink.

    train_images, test_images: uint8 [n, 28, 28].
    train_labels, test_labels: int64 [n], each an index into `classes`.
    source: "MNIST", "Fashion-MNIST", "KMNIST" or "MNIST sample".
    classes: the ten class names.
    note: one line for the user (reason and remedy) if the sample replaces MNIST, else empty.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    source: str
    classes: tuple[str, ...]
    note: str = ""


def load_digits(config: DataConfig) -> Digits:
    """The set that `config.source` names; "auto" is MNIST, or the embedded sample if MNIST is not available.

    Raises UserError for an unknown source, for a named set that is not available, and for a corrupt file (under "auto"
    too: a silent fallback would hide the damage).
    """
    if config.source == "sample":
        return load_sample()
    archive = ARCHIVES.get("mnist" if config.source == "auto" else config.source)
    if archive is None:
        raise UserError(f"--data-source {config.source!r} is unknown: choose from {', '.join(SOURCES)}")
    raw = config.directory / archive.folder / "raw"
    try:
        if missing_files(raw):
            if not config.download:
                raise UnavailableError(f"its files are not in {raw} and downloading is off")
            download(archive, raw, progress=config.progress)
        train_images, train_labels = read_split(raw, "train")
        test_images, test_labels = read_split(raw, "t10k")
    except UnavailableError as reason:
        remedy = f"put its files in {raw}, or name with --data-dir / NNDIST_DATA a folder that has {archive.folder}/raw"
        if config.source == "auto":
            stand_in = "this run uses the embedded sample of 5,000 MNIST digits"
            return load_sample(note=f"MNIST is not available ({reason}): {stand_in}; for all of MNIST, {remedy}")
        embedded = ", or use the embedded --data-source sample" if config.source == "mnist" else ""
        message = f"--data-source {config.source}: {archive.name} is not available ({reason}); {remedy}{embedded}"
        raise UserError(message) from None
    return Digits(train_images, train_labels, test_images, test_labels, archive.name, archive.classes)


def load_sample(note: str = "") -> Digits:
    """The embedded 4,000 + 1,000 MNIST digits, 400 + 100 of each class."""
    from PIL import Image

    with Image.open(SAMPLE_IMAGES_PATH, formats=["PNG"]) as sheet:
        pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
    rows, columns = SAMPLE_TILES
    images = pixels.view(rows, 28, columns, 28).transpose(1, 2).reshape(rows * columns, 28, 28)
    labels = torch.tensor([int(digit) for digit in SAMPLE_LABELS_PATH.read_text().split()[0]])
    train, test = slice(None, SAMPLE_NUM_TRAIN), slice(SAMPLE_NUM_TRAIN, None)
    return Digits(images[train], labels[train], images[test], labels[test], "MNIST sample", DIGIT_NAMES, note)


def file_name(split: str, kind: str) -> str:
    """MNIST's name for the "images" or "labels" of the split "train" or "t10k"."""
    return f"{split}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"


def missing_files(raw: Path) -> list[str]:
    """Names of those of the set's four files that are in `raw` neither plain nor as .gz."""
    names = [file_name(split, kind) for split in ("train", "t10k") for kind in ("images", "labels")]
    try:
        return [name for name in names if not (raw / name).is_file() and not (raw / f"{name}.gz").is_file()]
    except OSError as error:
        raise UnavailableError(f"cannot look into {raw}: {error.strerror}") from error


def read_split(raw: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images uint8 [n, 28, 28] and labels int64 [n] of one split. Raises UserError naming a corrupt file."""
    images_path, images = read_idx(raw / file_name(split, "images"), num_dimensions=3)
    labels_path, labels = read_idx(raw / file_name(split, "labels"), num_dimensions=1)
    if images.shape[1:] != (28, 28):
        raise corrupt(images_path, f"its images are {images.shape[1]}x{images.shape[2]}, not 28x28")
    if len(labels) != len(images):
        raise corrupt(labels_path, f"it holds {len(labels)} labels for the {len(images)} images of {images_path.name}")
    if int(labels.max()) > 9:
        raise corrupt(labels_path, f"it holds the label {int(labels.max())}, beyond 9")
    return images, labels.long()


def read_idx(path: Path, num_dimensions: int) -> tuple[Path, Tensor]:
    """The file read (`path`, or the .gz beside it) and its uint8 values in the shape its header gives.

    IDX is described at http://yann.lecun.com/exdb/mnist: bytes 0, 0, type (8 is uint8), number of dimensions, then
    each dimension as big-endian uint32, then the values.
    """
    if not path.is_file():
        path = path.with_name(f"{path.name}.gz")
    try:
        with open_regular(path) as file:
            if path.suffix == ".gz":
                data = np.frombuffer(bytearray(gzip.GzipFile(fileobj=file).read(MAX_BYTES)), dtype=np.uint8)
            elif (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
                raise corrupt(path, f"it holds {size:,} bytes")
            else:
                data = np.fromfile(file, dtype=np.uint8)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise corrupt(path, f"it cannot be unzipped ({error})") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): fix it, or name a different --data-dir") from error
    magic, header_bytes = bytes((0, 0, 8, num_dimensions)), 4 + 4 * num_dimensions
    header = data[:header_bytes].tobytes()
    if header[:4] != magic:
        raise corrupt(path, f"it starts with the bytes {header[:4].hex()!r}, not {magic.hex()!r}")
    shape = [int.from_bytes(header[start : start + 4], "big") for start in range(4, header_bytes, 4)]
    expected_bytes = header_bytes + math.prod(shape)
    if len(data) != expected_bytes or 0 in shape:
        raise corrupt(path, f"its header's shape {shape} needs {expected_bytes} bytes, but it holds {len(data)}")
    return path, torch.from_numpy(data[header_bytes:]).view(shape)


def corrupt(path: Path, problem: str) -> UserError:
    """The error for a damaged file."""
    return UserError(f"{path} is corrupt: {problem}; delete it and start again to download it")


def download(archive: Archive, raw: Path, *, progress: bool) -> None:
    """Download the set's missing files to `raw`, one process at a time: the others then find them there.

    Mirrors, names and checksums are torchvision's. Raises UnavailableError if no mirror provides a file or `raw` can't
    be written to.
    """
    import torchvision.datasets

    published = getattr(torchvision.datasets, archive.folder)
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with FileLock(raw / ".download.lock"):
            missing = missing_files(raw)
            deadline = time.monotonic() + DOWNLOAD_DEADLINE_SECONDS
            for zipped_name, md5 in published.resources:
                name = zipped_name.removesuffix(".gz")
                if name in missing:
                    zipped = fetch_from_any(published.mirrors, zipped_name, md5, deadline, progress)
                    write_whole(raw / name, gzip.decompress(zipped))
    except OSError as error:
        raise UnavailableError(f"cannot write to {raw}: {error.strerror}") from error


def fetch_from_any(mirrors: Sequence[str], name: str, md5: str, deadline: float, progress: bool) -> bytes:
    """The named file from the first mirror that has it intact. Raises UnavailableError with each mirror's failure."""
    failures = []
    for mirror in mirrors:
        try:
            return fetch(mirror + name, md5, deadline, progress)
        except (OSError, HTTPException) as error:
            failure = str(error).removeprefix("<urlopen error ").removesuffix(">") or type(error).__name__
            failures.append(f"{urllib.parse.urlsplit(mirror).netloc}: {' '.join(failure.split())}")
    raise UnavailableError(f"download of {name} failed, {', '.join(failures)}")


def fetch(url: str, md5: str, deadline: float, progress: bool) -> bytes:
    """The bytes at `url`; raises OSError if they fail to arrive by `deadline` (of time.monotonic) or to match `md5`."""
    data, name = bytearray(), Path(url).name
    with (
        open_url(url) as response,
        bar(response.length, name, shown=progress, leave=True, unit="B", unit_scale=True) as shown,
    ):
        while chunk := response.read1(1 << 16):
            data += chunk
            shown.update(len(chunk))
            if time.monotonic() > deadline:
                raise TimeoutError(f"not done in {DOWNLOAD_DEADLINE_SECONDS:g} s")
            if len(data) > MAX_BYTES:
                raise OSError(f"more than {MAX_BYTES:,} bytes came")
    if hashlib.md5(data, usedforsecurity=False).hexdigest() != md5:
        raise OSError(f"received {len(data)} bytes whose md5 is not {md5}")
    return bytes(data)


def open_url(url: str) -> HTTPResponse:
    """`urlopen` in OPEN_TIMEOUT_SECONDS at most: its own timeout excludes DNS and restarts for each address."""
    outcome: queue.SimpleQueue[HTTPResponse | Exception] = queue.SimpleQueue()

    def attempt() -> None:
        request = urllib.request.Request(url, headers={"User-Agent": "nndist"})
        try:
            outcome.put(urllib.request.urlopen(request, timeout=READ_TIMEOUT_SECONDS))
        except Exception as error:
            outcome.put(error)

    threading.Thread(target=attempt, daemon=True).start()
    try:
        result = outcome.get(timeout=OPEN_TIMEOUT_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer in {OPEN_TIMEOUT_SECONDS:g} s") from None
    if isinstance(result, Exception):
        raise result
    return result


def digits(config: DataConfig, prepare: Callable[[Tensors], Tensors]) -> Data:
    """The digits as (images, labels) on the device, `prepare`d there; raises UserError as `load_digits` does."""
    loaded = load_digits(config)
    return Data(
        train=Resident(loaded.train_images, loaded.train_labels),
        test=Resident(loaded.test_images, loaded.test_labels),
        source=loaded.source,
        prepare=prepare,
        classes=loaded.classes,
        note=loaded.note,
    )


def few_of_each_class(digits: ExampleSet, count: int, seed: int) -> Resident:
    """The first `count` examples, if there are as many, of each class of a set of (images, labels) in random order."""
    assert isinstance(digits, Resident)
    images, labels = digits.tensors
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[labels[order] == kind][:count] for kind in labels.unique()])
    return Resident(images[chosen], labels[chosen])
