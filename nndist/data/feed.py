"""Each process's share of the training set, in the global order, from any position."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import PACKAGE
from .batches import Batch
from .randomness import times_before, times_of, with_times
from .sets import ExampleSet, Resident, part, with_wholes


@lru_cache(maxsize=64)
def micro_slices(
    length: int, rank: int, world_size: int, accumulate: int, least: int = 1
) -> tuple[tuple[int, int], ...]:
    """Start and stop, within a global batch of `length` examples, of each micro-batch of process `rank`.

    Every process gets the same number of micro-batches, because each may involve collectives; if there are too few
    examples, the last ones are empty (start == stop). least: a batch is split into fewer micro-batches if they would be
    smaller than this.
    """
    first, last = part(length, rank, world_size)
    largest_share = -(-length // world_size)
    count = min(accumulate, max(1, largest_share // least))
    slices = (part(last - first, index, count) for index in range(count))
    return tuple((first + start, first + stop) for start, stop in slices)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """raw: the batch. size: its number of examples. numbers: which ones. Size 0 is one example that must not count.

    times: see ExampleRandom.

    A process without an example in a small last batch still has to join the collectives of the backward pass.
    """

    raw: Batch
    size: int
    numbers: Tensor
    times: Tensor | None = None


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """One optimizer step's examples. micro_batches: this process's. size: examples over all processes."""

    epoch: int
    index: int
    size: int
    micro_batches: tuple[MicroBatch, ...]


class Feed:
    """This process's share of the training set, in the global order.

    batch_size: the global batch, in examples. seed: of the order. rank, world_size: this process and the number of
    processes. accumulate: micro-batches that its share of a batch is split into. drop_last: whether to drop a smaller
    last batch of an epoch. Raises UserError if a batch has fewer examples than there are processes, or an epoch has no
    batch.
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
                f"--batch-size {batch_size}: smaller than the {world_size} processes it is split over; "
                f"give at least {world_size}, or start fewer processes"
            )
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.place = (rank, world_size, accumulate)
        self.least = 1  # examples of a micro-batch (see `micro_slices`)
        num_examples = self.num_examples = len(examples)
        self.steps_per_epoch = num_examples // batch_size if drop_last else -(-num_examples // batch_size)
        if not num_examples:
            raise UserError("the training set has 0 examples; check the recipe's data()")
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
        """Takes effect with the next call of `epoch`."""
        self.place = (*self.place[:2], count)

    @property
    def largest_micro_batch(self) -> int:
        """Examples of the largest micro-batch of any process."""
        _, world_size, accumulate = self.place
        share = -(-min(self.batch_size, len(self.examples)) // world_size)
        return -(-share // accumulate)

    def order(self, epoch: int) -> Tensor:
        """The order of an epoch, int64 [number of examples]; raises UserError for another one of a set's own."""
        if len(self.examples) != self.num_examples:
            raise UserError(
                f"the training set had {self.num_examples} examples at the start and has {len(self.examples)} now; "
                "give it all of them from the start, and let __getitem__ or order() choose among them"
            )
        order = self.examples.order(self.seed, epoch, self.shuffle, self.batch_size)
        if self.has_own_order:
            self._check(order)
        return order

    @property
    def has_own_order(self) -> bool:
        """Whether the set, or one that it is a part of, has an order() of the user's own."""
        own = (getattr(type(examples), "order", None) for examples in with_wholes(self.examples))
        return any(order is not None and not order.__module__.startswith(f"{PACKAGE.name}.") for order in own)

    def _check(self, order: Any) -> None:
        whole = isinstance(order, Tensor) and order.dtype == torch.int64 and order.dim() == 1
        count = self.num_examples
        if not whole or len(order) != count or (count and not 0 <= int(order.min()) <= int(order.max()) < count):
            shown = f"{order.dtype} {list(order.shape)}" if isinstance(order, Tensor) else type(order).__name__
            raise UserError(
                f"order() of the training set returns {shown}; it must return int64 [{count}], each from 0 to "
                f"{count - 1}: as many as the set has, and some of them more than once if you like"
            )

    def order_checksum(self, epoch: int) -> int | None:
        """A CRC-32 of an epoch's order if it is of the user's own; raises UserError if it is another each time."""
        if not self.has_own_order:
            return None
        order = self.order(epoch)
        if not torch.equal(order, self.order(epoch)):
            raise UserError(
                "order() of the training set returns another order each time it is called; it must be a function of "
                "the seed and the epoch: draw with generator=torch.Generator().manual_seed(...)"
            )
        return zlib.crc32(order.contiguous().numpy().data)

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
        times = times_before(order) if self.has_own_order else None
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
            """The examples of a micro-batch; of an empty one (see `MicroBatch`) the batch's first."""
            span = slice(begin + first, begin + last) if last > first else slice(begin, begin + 1)
            return with_times(order[span], None if times is None else times[span])

        examples = self.examples.in_epoch(self.seed, epoch)
        raw = examples.batches(numbers(begin, *place) for begin, _, slices in plan() for place in slices)
        for index, (begin, size, slices) in enumerate(plan(), start):
            micro_batches = tuple(
                [
                    MicroBatch(next(raw), last - first, which := numbers(begin, first, last), times_of(which))
                    for first, last in slices
                ]
            )
            yield GlobalBatch(epoch, index, size, micro_batches)

    def throwaway_batch(self) -> GlobalBatch:
        """A micro-batch as large as this process's first, of the set's first examples, for a pass that trains nothing.

        The real first batch might have to be fetched for it, as shards are.
        """
        size = min(self.batch_size, len(self.examples))
        first, last = micro_slices(size, *self.place, self.least)[0]
        numbers = torch.arange(max(1, last - first))
        raw = next(self.examples.in_epoch(self.seed, 0).batches([numbers]))
        return GlobalBatch(0, 0, size, (MicroBatch(raw, last - first, numbers),))


def evaluation_indices(num_examples: int, batch_size: int, rank: int, world_size: int) -> list[Tensor]:
    """The batches of example numbers that process `rank` evaluates: each example on exactly one process."""
    first, last = part(num_examples, rank, world_size)
    return [torch.arange(start, min(start + batch_size, last)) for start in range(first, last, batch_size)]
