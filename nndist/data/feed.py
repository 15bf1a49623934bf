"""Each process's share of the training set, in the global order, from any position on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import UserError
from .batches import Batch
from .sets import ExampleSet, Resident, part


@lru_cache(maxsize=64)
def micro_slices(
    length: int, rank: int, world_size: int, accumulate: int, least: int = 1
) -> tuple[tuple[int, int], ...]:
    """Start and stop, within a global batch of `length` examples, of each micro-batch of process `rank`.

    Every process gets equally many micro-batches, because each of them is a collective operation; where examples are
    fewer than places for them, the last are empty (start == stop). least: a batch that would give smaller micro-batches
    than that is split less often.
    """
    first, last = part(length, rank, world_size)
    largest_share = -(-length // world_size)
    count = min(accumulate, max(1, largest_share // least))
    slices = (part(last - first, index, count) for index in range(count))
    return tuple((first + start, first + stop) for start, stop in slices)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A raw batch, how many examples it holds, and which; size 0 is one example that must not count.

    A process without an example in a small last batch still has to take part in the collectives of the backward pass.
    """

    raw: Batch
    size: int
    numbers: Tensor


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """One optimizer step's examples: this process's micro-batches of them, and how many there are in all processes."""

    epoch: int
    index: int
    size: int
    micro_batches: tuple[MicroBatch, ...]


class Feed:
    """The training set in its global order, as this process sees it.

    batch_size: examples of an optimizer step, over all processes. seed: of the order. rank, world_size: which process
    of how many this is. accumulate: micro-batches that its share of a batch is split into. drop_last: an epoch ends
    before a last batch that would be smaller than the others. Raises UserError where a batch has fewer examples than
    there are processes, and where an epoch has no batch.
    """

    def __init__(
        self,
        examples: ExampleSet,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        drop_last: bool = False,
    ):
        if batch_size < world_size:
            raise UserError(
                f"--batch-size {batch_size}: smaller than the {world_size} processes it is shared out among; "
                f"give at least {world_size}, or start fewer processes"
            )
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.place = (rank, world_size, accumulate)
        self.least = 1  # examples of a micro-batch (see `micro_slices`)
        num_examples = len(examples)
        self.steps_per_epoch = num_examples // batch_size if drop_last else -(-num_examples // batch_size)
        if not num_examples:
            raise UserError("the training set has 0 examples; look at the recipe's data()")
        if not self.steps_per_epoch:
            raise UserError(
                f"--drop-last: leaves no batch, as the training set has {num_examples} examples and --batch-size is "
                f"{batch_size}; give --batch-size {num_examples} or less"
            )

    @property
    def accumulate(self) -> int:
        """Micro-batches that each process splits its share of a batch into."""
        return self.place[2]

    @accumulate.setter
    def accumulate(self, count: int) -> None:
        """Holds from the next call of `epoch` on."""
        self.place = (*self.place[:2], count)

    @property
    def largest_micro_batch(self) -> int:
        """Examples of the largest micro-batch of any process."""
        _, world_size, accumulate = self.place
        share = -(-min(self.batch_size, len(self.examples)) // world_size)
        return -(-share // accumulate)

    def order(self, epoch: int) -> Tensor:
        """The order of an epoch, int64 [number of examples]."""
        return self.examples.order(self.seed, epoch, self.shuffle, self.batch_size)

    def example_numbers(self, epoch: int, index: int) -> Tensor:
        """The examples of all processes in batch `index` of an epoch, int64 [batch size]."""
        return self.order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]

    def local_numbers(self, epoch: int, index: int) -> Tensor:
        """This process's examples of that batch, in the order of its losses."""
        batch = self.example_numbers(epoch, index)
        return torch.cat([batch[start:stop] for start, stop in micro_slices(len(batch), *self.place, self.least)])

    def epoch(self, epoch: int, start: int = 0) -> Iterator[GlobalBatch]:
        """The global batches of an epoch from batch `start` on."""
        order = self.order(epoch)
        device = self.examples.tensors[0].device if isinstance(self.examples, Resident) else None
        if device is not None:
            order = order.to(device)  # once per epoch: a batch's indices are then a view on the device
        total = len(order)

        def plan() -> Iterator[tuple[int, int, tuple[tuple[int, int], ...]]]:
            for index in range(start, self.steps_per_epoch):
                begin = index * self.batch_size
                size = min(self.batch_size, total - begin)
                yield begin, size, micro_slices(size, *self.place, self.least)

        def numbers(begin: int, first: int, last: int) -> Tensor:
            return order[begin + first : begin + last] if last > first else order[begin : begin + 1]

        examples = self.examples.in_epoch(self.seed, epoch)
        raw = examples.batches(numbers(begin, *place) for begin, _, slices in plan() for place in slices)
        for index, (begin, size, slices) in enumerate(plan(), start):
            micro_batches = tuple(
                [MicroBatch(next(raw), last - first, numbers(begin, first, last)) for first, last in slices]
            )
            yield GlobalBatch(epoch, index, size, micro_batches)

    def throwaway_batch(self) -> GlobalBatch:
        """A micro-batch as large as this process's first, of the set's first examples, for a pass that trains nothing.

        Examples that lie far away, as shards do, would otherwise be fetched for it.
        """
        size = min(self.batch_size, len(self.examples))
        first, last = micro_slices(size, *self.place, self.least)[0]
        numbers = torch.arange(max(1, last - first))
        raw = next(self.examples.in_epoch(self.seed, 0).batches([numbers]))
        return GlobalBatch(0, 0, size, (MicroBatch(raw, last - first, numbers),))


def evaluation_indices(num_examples: int, batch_size: int, rank: int, world_size: int) -> list[Tensor]:
    """The batches of example numbers that process `rank` evaluates: each example in exactly one of all processes."""
    first, last = part(num_examples, rank, world_size)
    return [torch.arange(start, min(start + batch_size, last)) for start in range(first, last, batch_size)]
