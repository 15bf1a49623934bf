"""MixUp and CutMix, exact on any number of processes: each example is mixed with one of the whole set.

MixUp: Zhang et al. 2018, https://arxiv.org/abs/1710.09412. CutMix: Yun et al. 2019, https://arxiv.org/abs/1905.04899.
Both are usually applied to pairs within a batch, whose members depend on how it is split over processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..errors import UserError
from .batches import inputs_and_labels
from .parts import some_of
from .randomness import ExampleRandom, times_of, with_times
from .sets import ExampleSet, Tensors

ATTEMPTS = 16  # at a draw from a Beta distribution; with alpha at most 1 all fail once in 65,000 times


class Mixed(ExampleSet):
    """A set of (images, labels) whose training examples are each mixed with another of the set, drawn at random.

    examples: images [k, h, w, ...] of any dtype, and labels [k]. mixup, cutmix: alpha of Beta(alpha, alpha), from which
    the share of the first image is drawn, above 0 and at most 1; 0 for none. With both, each example gets one or the
    other. A batch is (images, labels, the other images' labels, shares of the first [k], float32); outside training
    the images are unchanged and the shares 1. The partner and the share are functions of (seed, epoch, example);
    every example is read twice in an epoch, on average. A loss is
    `share * cross_entropy(labels) + (1 - share) * cross_entropy(others)`.
    """

    def __init__(self, examples: ExampleSet, *, mixup: float = 0.0, cutmix: float = 0.0):
        for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
            if not 0 <= alpha <= 1:
                raise UserError(f"--{name} {alpha:g}: must be at least 0 and at most 1")
        self.examples, self.mixup, self.cutmix = examples, mixup, cutmix
        self.epoch_of_training: tuple[int, int] | None = None  # seed and epoch

    def __len__(self) -> int:
        return len(self.examples)

    def to(self, device: torch.device) -> Mixed:
        return self._of(self.examples.to(device))

    def part(self, numbers: Tensor) -> Mixed:
        """The set of these examples, which are mixed with each other only: none of a held-out one is seen."""
        return self._of(some_of(self.examples, numbers))

    def order(self, seed: int, epoch: int, shuffle: bool, batch_size: int) -> Tensor:
        return self.examples.order(seed, epoch, shuffle, batch_size)

    def named(self, numbers: Tensor) -> Tensor:
        return self.examples.named(numbers)

    def fingerprint(self) -> str:
        return self.examples.fingerprint()

    def in_epoch(self, seed: int, epoch: int) -> Mixed:
        there = self._of(self.examples.in_epoch(seed, epoch))
        there.epoch_of_training = (seed, epoch)
        return there

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensors]:
        if self.epoch_of_training is None or not (self.mixup or self.cutmix):
            for batch in self.examples.batches(indices):
                images, labels = inputs_and_labels(batch, "Mixed")
                yield images, labels, labels, torch.ones(len(images), device=images.device)
            return
        drawn: list[Tensor] = []  # the example numbers of batches that are being read

        def with_partners() -> Iterator[Tensor]:
            for index in indices:
                times = times_of(index)
                numbers = with_times(index.cpu(), times)
                drawn.append(numbers)
                both = torch.cat([numbers, self._partners(numbers)])
                yield with_times(both, None if times is None else times.repeat(2))

        for batch in self.examples.batches(with_partners()):
            numbers = drawn.pop(0)
            yield self._mixed(numbers, *inputs_and_labels(batch, "Mixed"))

    def _of(self, examples: ExampleSet) -> Mixed:
        there = Mixed(examples, mixup=self.mixup, cutmix=self.cutmix)
        there.epoch_of_training = self.epoch_of_training
        return there

    def _random(self, numbers: Tensor, purpose: str) -> ExampleRandom:
        assert self.epoch_of_training is not None
        times = times_of(numbers)
        return ExampleRandom(*self.epoch_of_training, numbers, purpose, None if times is None else times.cpu())

    def _partners(self, numbers: Tensor) -> Tensor:
        high, low = self._random(numbers, "partner").uniform(2).double().unbind(1)
        return ((high + low * 2**-24) * len(self)).long().clamp_max(len(self) - 1)

    def _mixed(self, numbers: Tensor, both: Tensor, labels: Tensor) -> Tensors:
        first, second = both.chunk(2)
        random = self._random(numbers, "mix")
        which = random.uniform()[:, 0]
        cuts = torch.full_like(which, bool(self.cutmix)) if not (self.mixup and self.cutmix) else (which < 0.5).float()
        blend = beta(random, self.mixup or 1.0)
        cut, box = _boxes(random, beta(random, self.cutmix or 1.0), first.shape[1], first.shape[2])
        share = torch.where(cuts > 0, cut, blend).to(first.device)
        box = (box & (cuts > 0).view(-1, 1, 1)).to(first.device).view(*box.shape, *[1] * (first.dim() - 3))
        weight = torch.where(cuts > 0, 1.0, blend).to(first.device).view(-1, *[1] * (first.dim() - 1))
        images = torch.where(box, second.float(), torch.lerp(second.float(), first.float(), weight))
        return images, *labels.chunk(2), share


def beta(random: ExampleRandom, alpha: float) -> Tensor:
    """One number per example from Beta(alpha, alpha), alpha at most 1, float32 [k] (Jöhnk 1964)."""
    drawn = random.uniform(2 * ATTEMPTS).double().clamp_min(2**-25).log().div(alpha).unflatten(1, (ATTEMPTS, 2))
    fits = drawn.exp().sum(2) <= 1  # [k, attempts]
    shares = torch.sigmoid(drawn[..., 0] - drawn[..., 1])
    chosen = shares.gather(1, fits.int().argmax(1, keepdim=True))[:, 0]
    return torch.where(fits.any(1), chosen, 0.5).float()


def _boxes(random: ExampleRandom, share: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Boxes that leave about `share` of an image: the share that each leaves, [k], and its pixels, bool [k, h, w]."""
    side = (1 - share).sqrt()
    centre = random.uniform(2)
    inside = []
    for place, length in ((centre[:, 0], height), (centre[:, 1], width)):
        middle, half = (place * length).floor(), (side * length / 2).floor()
        pixel = torch.arange(length)
        inside.append((pixel >= (middle - half).unsqueeze(1)) & (pixel < (middle + half).unsqueeze(1)))
    box = inside[0].unsqueeze(2) & inside[1].unsqueeze(1)
    return 1 - box.float().mean((1, 2)), box
