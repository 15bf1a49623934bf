"""Digits in two styles, plain and bold italic, of which none is in both: for style transfer without pairs.

The digits are MNIST's, or of its kin. Italic ones are made by a rule, so each digit's true picture in the other style
is known and can be compared with.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nndist.data.config import DataConfig
from nndist.data.sets import Data, Resident, Tensors
from nndist.figures.generated_images import Reader, trained_reader

from .mnist import load_digits

SLANT = 0.3  # columns to the right for each row upwards
CLASSES = 10
JUDGED_FROM = 10_000  # digits that the judge is trained on, in both styles


def load_styles(config: DataConfig, num_train: int) -> tuple[Data, Reader]:
    """The first training digits, `num_train` in each style or as many as there are, and all test digits.

    A prepared batch holds k plain digits and their classes, k others in italics and theirs, and the truth of each in
    the other style: ink from 0 to 1, float [k, 1, 28, 28], and int64 [k]. Also returns a judge: a classifier of 2 *
    CLASSES classes, each in plain and then each in italics, trained on the training set; deterministic. Raises
    UserError as `load_digits` does.
    """
    loaded = load_digits(config)
    data = Data(
        train=in_halves(loaded.train_images[: 2 * num_train], loaded.train_labels[: 2 * num_train]),
        test=in_halves(loaded.test_images, loaded.test_labels),
        source=loaded.source,
        prepare=in_styles,
        classes=loaded.classes,
        note=loaded.note,
    )
    return data, trained_judge(config)


@functools.lru_cache(maxsize=1)
def trained_judge(config: DataConfig) -> Reader:
    """The judge of `load_styles`, which nothing changes: seconds to train, so a process does it once."""
    loaded = load_digits(config)
    plain, labels = loaded.train_images[:JUDGED_FROM].unsqueeze(1) / 255, loaded.train_labels[:JUDGED_FROM]
    known = Resident(torch.cat([plain, italic(plain)]), torch.cat([labels, labels + CLASSES]))
    kinds = [f"{name} {style}" for style in ("plain", "italic") for name in loaded.classes]
    return trained_reader(Data(known, known, classes=kinds), len(known))


def in_halves(images: Tensor, labels: Tensor) -> Resident:
    """The first half of the digits with their classes, beside the second half; an odd digit is left out."""
    half = len(images) // 2
    return Resident(images[:half], labels[:half], images[half : 2 * half], labels[half : 2 * half])


def in_styles(batch: Tensors) -> Tensors:
    """The `prepare` of these digits, of batches as `in_halves` makes them; see `load_styles`."""
    plain, classes, others, their_classes = batch
    plain, others = plain.unsqueeze(1) / 255, others.unsqueeze(1) / 255
    return plain, classes, italic(others), their_classes, italic(plain), others


def italic(images: Tensor) -> Tensor:
    """Images, ink [k, 1, 28, 28], slanted to the right and their strokes thickened by a pixel on each side."""
    shear = images.new_tensor([[1.0, SLANT, 0.0], [0.0, 1.0, 0.0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(shear, list(images.shape), align_corners=False)
    return F.max_pool2d(F.grid_sample(images, grid, align_corners=False), 3, stride=1, padding=1)


def judged(judge: Reader, made: Mapping[str, Tensor], wanted: Tensor) -> dict[str, Tensor]:
    """Scores of pictures by the names of the ways they were made, the means of both directions, [k] each.

    made: ink [2 * k, 1, 28, 28], k digits in italics and then k others plain; under "truth" the true ones. wanted: each
    one's class as the judge counts, int64 [2 * k]. "digit": whether the judge reads the digit, in whichever style;
    "style": whether the style, of whichever digit; "accuracy": both. "error": see `error`.
    """
    judge = copy.deepcopy(judge).to(wanted.device)
    scores: dict[str, Tensor] = {}
    for name, images in made.items():
        said = judge.read(images)[1].argmax(1)
        right = {"digit": said % CLASSES == wanted % CLASSES, "style": said // CLASSES == wanted // CLASSES}
        both = {"accuracy": said == wanted, "error": error(images, made["truth"])}
        scores |= {f"{score}/{name}": x.float().view(2, -1).mean(0) for score, x in (right | both).items()}
    return scores


def error(images: Tensor, others: Tensor) -> Tensor:
    """Mean absolute difference per pixel, [k]."""
    return (images - others).abs().mean((1, 2, 3))
