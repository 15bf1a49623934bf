"""Canvases of 48x48 pixels with up to three real digits of several sizes among clutter: generated from a seed.

The digits are MNIST's, or of its kin, each shrunk or enlarged to a box of its own, none over another. Clutter is what
cluttered MNIST has (Mnih et al. 2014, https://arxiv.org/abs/1406.6247): pieces of 8x8 pixels cut out of other digits;
besides, paper that is brighter on one side, and noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nndist.data.config import DataConfig
from nndist.data.randomness import ExampleRandom
from nndist.data.sets import Resident, Tensors

from .mnist import Digits, load_digits

SIDE = 48
MOST_DIGITS = 3
SMALLEST, LARGEST = 18, 36  # pixels for the 28 of a digit's image, of which its ink takes about 20
TRIES = 12  # places that are tried for a digit; it is left out if all lie over another
PIECES, PIECE = 3, 8
AT_ONCE = 500  # canvases, which bounds the memory


@dataclass(frozen=True)
class Canvases:
    """n canvases.

    images: uint8 [n, SIDE, SIDE]; paper is dark, ink bright. masks: uint8 [n, SIDE, SIDE], 0 for paper and clutter,
    1 + class where a digit's ink is. boxes: float32 [n, MOST_DIGITS, 4], left, top, right and bottom of each digit's
    ink in pixels; 0 where there is none. labels: int64 [n, MOST_DIGITS], each digit's class; -1 where there is none.
    """

    images: Tensor
    masks: Tensor
    boxes: Tensor
    labels: Tensor

    def with_boxes(self) -> Resident:
        """The images, boxes, labels and the canvases' numbers, int64 [n], as a set."""
        return Resident(self.images, self.boxes, self.labels, torch.arange(len(self.images)))


def as_floats(batch: Tensors) -> Tensors:
    """A `prepare` for batches of canvases and others: images [k, 1, SIDE, SIDE], brightness from 0 to 1."""
    images, *others = batch
    return (images.unsqueeze(1) / 255, *others)


def load_canvases(config: DataConfig, num_train: int, num_test: int, seed: int) -> tuple[Canvases, Canvases, Digits]:
    """Canvases of the training and of the test digits, and these; raises UserError as `load_digits` does."""
    digits = load_digits(config)
    train = draw(digits.train_images, digits.train_labels, num_train, seed, "train")
    return train, draw(digits.test_images, digits.test_labels, num_test, seed, "test"), digits


def draw(images: Tensor, labels: Tensor, count: int, seed: int, split: str) -> Canvases:
    """`count` canvases of the given digits, uint8 [m, 28, 28] and int64 [m].

    Canvas n is a pure function of the digits, seed, split and n: of more canvases the first are the same.
    """
    ink = ink_boxes(images)
    parts = []
    for numbers in torch.arange(count).split(AT_ONCE):
        random = ExampleRandom(seed, 0, numbers, f"canvas/{split}")
        chosen = (random.uniform(MOST_DIGITS) * len(images)).long()  # [k, MOST_DIGITS]
        boxes, scales, there = placed(ink[chosen], random)
        drawn = torch.zeros(len(numbers), SIDE, SIDE)
        masks = torch.zeros(len(numbers), SIDE, SIDE, dtype=torch.uint8)
        brightness = 0.6 + 0.4 * random.uniform(MOST_DIGITS)
        for place in range(MOST_DIGITS):
            digit = stamped(images[chosen[:, place]], ink[chosen[:, place]], boxes[:, place], scales[:, place])
            digit = digit * there[:, place, None, None]
            masks = torch.where(digit > 0.5, 1 + labels[chosen[:, place], None, None].to(torch.uint8), masks)
            drawn = torch.maximum(drawn, digit * brightness[:, place, None, None])
        drawn = torch.maximum(drawn, clutter(images, random))
        drawn = torch.maximum(drawn, paper(random)) + 0.05 * random.normal(SIDE * SIDE).unflatten(1, (SIDE, SIDE))
        pixels = (255 * drawn).round().clamp(0, 255).to(torch.uint8)
        parts.append((pixels, masks, boxes * there.unsqueeze(2), torch.where(there, labels[chosen], -1)))
    return Canvases(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def ink_boxes(images: Tensor) -> Tensor:
    """Left, top, right, bottom of the ink of images, uint8 [m, h, w]: float32 [m, 4]; the whole image if none."""
    edges = []
    for axis in (1, 2):  # over the rows: columns with ink
        present = (images > 127).any(axis)
        places = torch.arange(present.shape[1])
        first = torch.where(present, places, present.shape[1]).amin(1)
        last = torch.where(present, places + 1, 0).amax(1)
        none = ~present.any(1)
        edges.append((first.masked_fill(none, 0), last.masked_fill(none, present.shape[1])))
    (left, right), (top, bottom) = edges
    return torch.stack([left, top, right, bottom], 1).float()


def placed(ink: Tensor, random: ExampleRandom) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes [k, MOST_DIGITS, 4], scales and whether there is room, [k, MOST_DIGITS], for digits of these ink boxes."""
    scales = (SMALLEST + (LARGEST - SMALLEST) * random.uniform(MOST_DIGITS)) / 28
    sides = (ink[..., 2:] - ink[..., :2]) * scales.unsqueeze(2)  # [k, MOST_DIGITS, 2]: width, height
    corners = random.uniform(MOST_DIGITS * TRIES * 2).unflatten(1, (MOST_DIGITS, TRIES, 2))
    corners = corners * (SIDE - sides).unsqueeze(2)
    tried = torch.cat([corners, corners + sides.unsqueeze(2)], 3)  # [k, MOST_DIGITS, TRIES, 4]
    boxes, there = [tried[:, 0, 0]], [torch.ones(len(ink), dtype=torch.bool)]
    for place in range(1, MOST_DIGITS):
        free = torch.ones(len(ink), TRIES, dtype=torch.bool)
        for box, is_there in zip(boxes, there, strict=True):
            beside = (tried[:, place, :, :2] > box[:, None, 2:] + 1) | (tried[:, place, :, 2:] < box[:, None, :2] - 1)
            free &= beside.any(2) | ~is_there.unsqueeze(1)
        first = free.int().argmax(1)  # the first place that is free
        boxes.append(tried[torch.arange(len(ink)), place, first])
        there.append(free.any(1))
    return torch.stack(boxes, 1), scales, torch.stack(there, 1)


def stamped(images: Tensor, ink: Tensor, boxes: Tensor, scales: Tensor) -> Tensor:
    """Each digit, uint8 [k, 28, 28], alone on a canvas, with its ink box laid over `boxes`: [k, SIDE, SIDE], 0 to 1."""
    centres = torch.arange(SIDE) + 0.5
    x, y = ((centres - boxes[:, side, None]) / scales[:, None] + ink[:, side, None] for side in (0, 1))
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), 3) / 14 - 1  # [k, SIDE, SIDE, 2]
    return F.grid_sample(images.unsqueeze(1) / 255, grid, align_corners=False).squeeze(1)


def clutter(images: Tensor, random: ExampleRandom) -> Tensor:
    """Pieces cut out of the middle of digits, anywhere on canvases: [k, SIDE, SIDE], ink from 0 to 1."""
    count = len(random.numbers)
    of, row, column, top, left, bright = random.uniform(6 * PIECES).unflatten(1, (6, PIECES)).unbind(1)
    within = torch.arange(PIECE)

    def spread(start: Tensor, low: int, room: int, axis: int) -> Tensor:
        """Rows or columns of each piece, int64 [k, PIECES, PIECE, 1] or [k, PIECES, 1, PIECE]."""
        places = low + (start * (room + 1)).long().unsqueeze(2) + within
        return places.unsqueeze(axis)

    numbers = (of * len(images)).long()[..., None, None]
    cut = images[numbers, spread(row, 6, 28 - 12 - PIECE, 3), spread(column, 6, 28 - 12 - PIECE, 2)] / 255
    places = SIDE * spread(top, 0, SIDE - PIECE, 3) + spread(left, 0, SIDE - PIECE, 2)
    values = cut * (0.6 + 0.4 * bright)[..., None, None]
    flat = torch.zeros(count, SIDE * SIDE).scatter_reduce(1, places.flatten(1), values.flatten(1), "amax")
    return flat.unflatten(1, (SIDE, SIDE))


def paper(random: ExampleRandom) -> Tensor:
    """Brightness of paper that is lit from one side, [k, SIDE, SIDE], from 0 to at most 0.4."""
    turn, most = random.uniform(2).unbind(1)
    across = torch.linspace(-1, 1, SIDE)
    angle = (2 * math.pi * turn)[:, None, None]
    along = angle.cos() * across + angle.sin() * across[:, None]  # [k, SIDE, SIDE], up to sqrt(2)
    return 0.4 * most[:, None, None] * (along / math.sqrt(2) + 1) / 2
