"""Digits found on canvases without a network: connected bright pixels, named by the most similar mean digit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .canvases import ink_boxes
from .mnist import Digits

THRESHOLD = 0.5  # paper is darker, every digit brighter, see canvases.draw
CROP = 20  # pixels to a side at which they are compared
LEAST_SIDE = 6  # pixels of a component's longer side
MOST_FOUND = 12  # components of a canvas


def found_components(images: Tensor, means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What connected pixels are: boxes float32 [n, MOST_FOUND, 4], labels int64 and scores [n, MOST_FOUND], best first.

    images: brightness from 0 to 1, [n, h, w], on the CPU. means: of the digits of each class, from `mean_digits`. A
    score is the cosine similarity with the most similar of these, whose class it is; 0 where there is no component.
    """
    found = torch.zeros(len(images), MOST_FOUND, 6)
    for number, (image, marked) in enumerate(zip(images, components(images > THRESHOLD), strict=True)):
        parts = torch.stack([255 * (marked == value) for value in marked.unique()[1:]] or [torch.zeros_like(marked)])
        boxes = ink_boxes(parts)
        boxes = boxes[(boxes[:, 2:] - boxes[:, :2]).amax(1) >= LEAST_SIDE][:MOST_FOUND]
        if marked.any() and len(boxes):
            crops = F.normalize(cropped(image.expand(len(boxes), -1, -1), boxes).flatten(1), dim=1)
            likeness, labels = (crops @ means.T).max(1)
            rows = torch.cat([boxes, labels.unsqueeze(1), likeness.unsqueeze(1)], 1)
            found[number, : len(rows)] = rows[likeness.argsort(descending=True)]
    return found[..., :4], found[..., 4].long(), found[..., 5]


def components(ink: Tensor) -> Tensor:
    """Connected pixels, also over corners, of bool [n, h, w]: int64 [n, h, w], a number for each component, else 0."""
    _, height, width = ink.shape
    marked = torch.arange(1.0, height * width + 1).view(height, width) * ink
    while True:
        spread = F.max_pool2d(marked.unsqueeze(1), 3, stride=1, padding=1).squeeze(1) * ink
        if torch.equal(spread, marked):
            return marked.long()
        marked = spread


def mean_digits(digits: Digits) -> Tensor:
    """The mean of the training digits of each class, cut to their ink: [classes, CROP * CROP], each of length 1."""
    crops = cropped(digits.train_images / 255, ink_boxes(digits.train_images)).flatten(1)
    means = [crops[digits.train_labels == label].mean(0) for label in range(len(digits.classes))]
    return F.normalize(torch.stack(means), dim=1)


def cropped(images: Tensor, boxes: Tensor) -> Tensor:
    """What is within boxes [k, 4] of images [k, h, w], scaled to CROP pixels to a side: [k, CROP, CROP]."""
    height, width = images.shape[1:]
    along = (torch.arange(CROP) + 0.5) / CROP
    x, y = (boxes[:, side, None] + along * (boxes[:, side + 2] - boxes[:, side])[:, None] for side in (0, 1))
    places = torch.broadcast_tensors(2 * x[:, None, :] / width - 1, 2 * y[:, :, None] / height - 1)
    return F.grid_sample(images.unsqueeze(1), torch.stack(places, 3), align_corners=False).squeeze(1)
