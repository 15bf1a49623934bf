"""Random transforms of one image for a batch on the device, seeded per example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .batches import Batch, inputs_and_labels
from .randomness import ExampleRandom, Generators, drawn_of


def per_example(transform: Callable[[Tensor], Tensor]) -> Callable[[Batch, ExampleRandom], Batch]:
    """An `augment` that calls `transform` with each image of a prepared batch (images, labels), on its device.

    transform: such as torchvision.transforms.v2's, from an image to one of a size that all have. It may draw from the
    generators of Python, NumPy and torch (on the CPU, as v2 does for all but GaussianNoise, also for images on a GPU),
    or from its own: they are seeded by (seed, epoch, example), each time anew for one that the order repeats, and
    restored afterwards. So what it draws is the same on any device, number of processes and after a resume. It costs
    some kernels and about 20 us an image, and a wait for the device in each step.
    """

    def augment(batch: Batch, random: ExampleRandom) -> Batch:
        images, _ = inputs_and_labels(batch, "per_example")
        generators = Generators(transform=transform)
        changed: list[Any] = []
        with generators.kept():
            for image, drawn in zip(images, drawn_of(random.numbers, random.times), strict=True):
                generators.seed(f"augment/{random.key}/{drawn}")
                changed.append(transform(image))
        return (torch.stack(changed), *batch[1:])

    return augment


def shifted(images: Tensor, by: Tensor, paper: float = 0.0) -> Tensor:
    """Images [k, c, h, w] moved by whole pixels: `by`, [k, 2], holds the steps to the right and down.

    paper: the value of the pixels that move in. Differentiable, and deterministic on every device.
    """

    def taken(size: int, steps: Tensor) -> Tensor:
        """[k, 1, size, size]: 1 where row i of the result is row j of the image (columns likewise), else 0."""
        places = torch.arange(size, device=by.device)
        return (places[:, None] - steps[:, None, None] == places).to(images.dtype).unsqueeze(1)

    rows, columns = taken(images.shape[2], by[:, 1]), taken(images.shape[3], by[:, 0])
    return rows @ (images - paper) @ columns.mT + paper
