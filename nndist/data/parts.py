"""Parts of a set: examples held out of training to validate with."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import UserError
from .batches import Batch
from .randomness import times_of, with_times
from .sets import Data, ExampleSet, Resident, permutation


def hold_out(data: Data, fraction: float) -> Data:
    """Data whose validation set is a fraction of its training examples, which are then not trained on.

    The choice is a function of their number and the fraction alone: the same for every seed, on every process. They are
    drawn at random, or are the last ones if the examples are `sequential`. If `more` holds the training set itself, it
    shrinks there too. Raises UserError if there is a validation set already, or either set would be empty.
    """
    flag = f"--hold-out {fraction:g}"
    if "val" in data.evaluation_sets():
        raise UserError(f"{flag}: the recipe's data has its own validation set; leave the flag out")
    total = len(data.train)
    count = round(fraction * total)
    if not 0 < count < total:
        raise UserError(
            f"{flag}: leaves {count:,} of {total:,} training examples to validate with; give another fraction"
        )
    chosen = torch.arange(total) if data.sequential else permutation(total, 0, HELD_OUT)
    return divided(data, *(numbers.sort().values for numbers in chosen.split([total - count, count])))


def divided(data: Data, to_train: Tensor, to_validate: Tensor) -> Data:
    """Data that trains on some of its training examples and validates with others; their numbers are int64 [n]."""
    rest, held_out = some_of(data.train, to_train), some_of(data.train, to_validate)
    more = {name: rest if examples is data.train else examples for name, examples in data.more.items()}
    return replace(data, train=rest, val=data.for_evaluation(held_out) if data.for_evaluation else held_out, more=more)


HELD_OUT = -1  # instead of an epoch: no epoch has this order


def some_of(examples: ExampleSet, numbers: Tensor) -> ExampleSet:
    """The examples of these numbers, int64 [n], as a set; a Resident one stays Resident.

    A set whose examples depend on each other has a method `part` for it.
    """
    if type(examples) is Resident:  # one of a class of its own may have its own order
        (whole,) = examples.batches([numbers])
        part = Resident(whole) if examples.whole is not examples.tensors else Resident(*whole)
        part.numbers = examples.named(numbers)
        return part
    own_part = getattr(examples, "part", None)
    return Part(examples, numbers) if own_part is None else own_part(numbers)


class Part(ExampleSet):
    """Some examples of another set, read as that set reads them. numbers: which ones, int64 [n]."""

    def __init__(self, whole: ExampleSet, numbers: Tensor):
        self.whole, self.numbers = whole, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def to(self, device: torch.device) -> Part:
        return Part(self.whole.to(device), self.numbers)

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        return self.whole.batches(with_times(self.numbers[index.cpu()], times_of(index)) for index in indices)

    def order(self, seed: int, epoch: int, shuffle: bool, batch_size: int) -> Tensor:
        """The whole set's order, which may be efficient to read, without the examples that are not here."""
        place = torch.full((len(self.whole),), -1)
        place[self.numbers] = torch.arange(len(self.numbers))
        order = place[self.whole.order(seed, epoch, shuffle, batch_size)]
        order = order[order >= 0]
        if 0 < len(order) < len(self):  # the whole set's takes some examples more than once, and so others not at all
            order = order.repeat(-(-len(self) // len(order)))
        return order[: len(self)]

    def named(self, numbers: Tensor) -> Tensor:
        return self.whole.named(self.numbers[numbers])

    def in_epoch(self, seed: int, epoch: int) -> Part:
        return Part(self.whole.in_epoch(seed, epoch), self.numbers)

    def fingerprint(self) -> str:
        known = self.whole.fingerprint()
        return known and f"{known}-{zlib.crc32(self.numbers.numpy().data):08x}"
