"""Sets of examples, the global order in which they are visited, and each process's share of it.

Epoch e visits a permutation that is a pure function of (seed, e); batch b is a slice of it; each process takes its part
of the slice. So a position in training is two integers, and the number of processes changes nothing.
"""

from __future__ import annotations

import copy
import hashlib
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from .errors import UserError

Tensors = tuple[Tensor, ...]
Decode = Callable[[Any, "ExampleRandom | None"], Any]
"""Makes a tensor, a number, or a tuple of them of what a dataset holds as one example (see Streamed)."""


class ExampleSet(Protocol):
    """A set of examples that can be read in any order; what is written out here holds for most sets."""

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> ExampleSet:
        """The same set, delivering its batches on `device`."""
        ...

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensors]:
        """One raw batch for each tensor of example numbers, in their order."""
        ...

    def order(self, seed: int, epoch: int, shuffle: bool, batch_size: int) -> Tensor:
        """The order of epoch `epoch` of a training, int64 [number of examples] on the CPU; a pure function."""
        return permutation(len(self), seed, epoch, shuffle)

    def in_epoch(self, seed: int, epoch: int) -> ExampleSet:
        """The same set as epoch `epoch` of a training reads it, where reading it draws random numbers."""
        return self

    def fingerprint(self) -> str:
        """By which a run that goes on knows its examples; "" where that would mean to read them all."""
        return ""


class Resident(ExampleSet):
    """Tensors that stay on the device whole; a batch is gathered there by index, without Python per example.

    All have the same first dimension, the number of examples, or it is a ValueError. Small types (uint8 images) save
    memory: `Data.prepare` turns a batch into the networks' input on the device.
    """

    def __init__(self, *tensors: Tensor):
        lengths = {len(tensor) for tensor in tensors}
        if len(lengths) != 1:
            raise ValueError(f"the tensors of a set must hold equally many examples, not {sorted(lengths)}")
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def to(self, device: torch.device) -> Resident:
        return Resident(*(tensor.to(device) for tensor in self.tensors))

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensors]:
        device = self.tensors[0].device
        for index in indices:
            index = index.to(device)
            yield tuple([tensor.index_select(0, index) for tensor in self.tensors])

    def fingerprint(self) -> str:
        """The CRC-32 of the tensors' bytes."""
        checksum = 0
        for tensor in self.tensors:
            plain = tensor.detach().cpu().contiguous().flatten()
            checksum = zlib.crc32(plain.view(torch.uint8).numpy().data if len(plain) else b"", checksum)
        return f"{checksum:08x}"


class Streamed(ExampleSet):
    """A map-style dataset that does not fit in memory: torch's DataLoader reads batches in worker processes.

    `dataset[i]` must be a pure function of i: anything random in it would depend on the workers. It gives a tensor, a
    number, or a tuple of them, or whatever `decode` makes such of. `decode(dataset[i], random)` runs in the workers
    too; in training `random` is an ExampleRandom of that one example, and all that it may draw from, elsewhere None.
    The examples of a batch are stacked. A UserError raised by either ends the run with its one line. Where the dataset
    has a `fingerprint`, a text, a run that goes on knows it by that.
    """

    def __init__(self, dataset: Any, num_workers: int = 2, decode: Decode | None = None):
        self.dataset = dataset
        self.num_workers = num_workers
        self.decode = decode
        self.device = torch.device("cpu")
        self.epoch_of_training: tuple[int, int] | None = None  # seed and epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def to(self, device: torch.device) -> Streamed:
        moved = copy.copy(self)
        moved.device = device
        return moved

    def in_epoch(self, seed: int, epoch: int) -> Streamed:
        there = copy.copy(self)
        there.epoch_of_training = (seed, epoch)
        return there

    def fingerprint(self) -> str:
        return getattr(self.dataset, "fingerprint", "")

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensors]:
        from torch.utils.data import DataLoader

        pinned = self.device.type == "cuda"
        # a forked worker has the recipe's module; one that is spawned would have to import it and can't
        can_fork = self.num_workers > 0 and "fork" in torch.multiprocessing.get_all_start_methods()
        loader = DataLoader(
            cast(Any, _Examples(self.dataset, self.decode, self.epoch_of_training)),
            # torch asks for batches of indices only as fast as its workers read, so an epoch's list may be lazy
            batch_sampler=cast(Any, (index.tolist() for index in indices)),
            num_workers=self.num_workers,
            multiprocessing_context="fork" if can_fork else None,
            collate_fn=_stack,
            pin_memory=pinned,
            # without its own generator an iterator draws from the global one, and dropout would depend on it
            generator=torch.Generator(),
        )
        for batch in loader:
            if isinstance(batch, str):
                raise UserError(batch)
            tensors = batch if isinstance(batch, list | tuple) else (batch,)
            yield tuple(tensor.to(self.device, non_blocking=pinned) for tensor in tensors)


class _Examples:
    """Example i of a dataset, decoded; a UserError as its text, since torch would wrap it in a traceback."""

    def __init__(self, dataset: Any, decode: Decode | None, epoch_of_training: tuple[int, int] | None):
        self.dataset, self.decode, self.epoch_of_training = dataset, decode, epoch_of_training

    def __getitems__(self, numbers: list[int]) -> list[Any]:
        """The examples of a batch, as far as they can be had: what is missing is not looked for again and again."""
        examples: list[Any] = []
        for number in numbers:
            examples.append(self[number])
            if isinstance(examples[-1], str):
                break
        return examples

    def __getitem__(self, number: int) -> Any:
        try:
            example = self.dataset[number]
            if self.decode is None:
                return example
            random = None
            if self.epoch_of_training is not None:
                random = ExampleRandom(*self.epoch_of_training, torch.tensor([number]), purpose="decode")
            return self.decode(example, random)
        except UserError as error:
            return str(error)


def _stack(examples: list[Any]) -> Any:
    """A batch, or the text of the first error among its examples."""
    from torch.utils.data import default_collate

    return next((example for example in examples if isinstance(example, str)), None) or default_collate(examples)


def as_is(batch: Tensors) -> Tensors:
    """The raw batch is the networks' input."""
    return batch


class ExampleRandom:
    """Random numbers that are a pure function of (seed, epoch, example).

    An example is augmented alike on any number of processes, in any micro-batch, and after a resume. What is drawn for
    another `purpose` is independent.
    """

    def __init__(self, seed: int, epoch: int, numbers: Tensor, purpose: str = "augment"):
        self.key = key_of(seed, epoch, purpose)
        self.numbers = numbers
        self.drawn = 0

    def uniform(self, count: int = 1) -> Tensor:
        """Numbers in [0, 1), float32 [k, count], different at each call; on the device of the example numbers."""
        columns = torch.arange(self.drawn, self.drawn + count, device=self.numbers.device)
        self.drawn += count
        # splitmix64 (Steele, Lea and Flood 2014) of a counter; int64 arithmetic wraps as it needs
        x = self.numbers.unsqueeze(1) * 0x2545F4914F6CDD1D + columns * -0x61C8864680B583EB + self.key
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            x = (x ^ _shift_right(x, shift)) * factor
        x = x ^ _shift_right(x, 31)
        return _shift_right(x, 40).to(torch.float32) * 2**-24

    def normal(self, count: int = 1) -> Tensor:
        """Normally distributed numbers, mean 0 and deviation 1, float32 [k, count] (Box and Muller 1958)."""
        radius = (-2 * torch.log1p(-self.uniform(count))).sqrt()  # 1 - u lies in (0, 1]
        return radius * torch.cos(2 * math.pi * self.uniform(count))


def key_of(seed: int, epoch: int, purpose: str = "augment") -> int:
    """What makes an ExampleRandom's numbers those of an epoch, a signed integer of 64 bits."""
    digest = hashlib.blake2b(f"{purpose}/{seed}/{epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Of int64 as if it had no sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@dataclass
class Data:
    """What a recipe trains on and is tested on.

    source: what the examples are, for people ("MNIST", "MNIST sample", "generated").
    prepare: makes the networks' input of a raw batch; it runs on the device.
    augment: changes a prepared training batch at random, with the given ExampleRandom and nothing else.
    more: further sets to evaluate, by name, besides "test".
    classes: the names of the classes, where there are such.
    note: one line to be shown before training, such as that a sample stands in for the real set.

    Raises ValueError where one of `more` is called train or test.
    """

    train: ExampleSet
    test: ExampleSet
    source: str = "generated"
    prepare: Callable[[Tensors], Tensors] = as_is
    augment: Callable[[Tensors, ExampleRandom], Tensors] | None = None
    more: dict[str, ExampleSet] = field(default_factory=dict)
    classes: Sequence[str] = ()
    note: str = ""

    def __post_init__(self) -> None:
        if taken := {"train", "test"} & self.more.keys():
            raise ValueError(f"a further set can't be called {taken.pop()!r}: its scores would mix with others")

    def to(self, device: torch.device) -> Data:
        """The same data, delivered on `device`."""
        moved: dict[int, ExampleSet] = {}  # "more" often names the training set again: one copy on the device

        def move(examples: ExampleSet) -> ExampleSet:
            return moved.setdefault(id(examples), examples.to(device))

        return Data(
            train=move(self.train),
            test=move(self.test),
            source=self.source,
            prepare=self.prepare,
            augment=self.augment,
            more={name: move(examples) for name, examples in self.more.items()},
            classes=self.classes,
            note=self.note,
        )

    def evaluation_sets(self) -> dict[str, ExampleSet]:
        """Every set that is evaluated, by the name that its scores carry."""
        return {"test": self.test, **self.more}

    def inputs(self, examples: ExampleSet, start: int = 0, stop: int | None = None) -> Tensors:
        """Examples start to stop (default: the last) of a set, prepared, in one batch; for figures."""
        stop = len(examples) if stop is None else min(stop, len(examples))
        return self.prepare(next(iter(examples.batches([torch.arange(start, stop)]))))


def scale_images(mean: float, std: float) -> Callable[[Tensors], Tensors]:
    """Makes a `prepare` for (images, labels): uint8 [k, 28, 28] -> float [k, 1, 28, 28], (x / 255 - mean) / std."""
    scale, shift = 1 / (255 * std), -mean / std

    def prepare(batch: Tensors) -> Tensors:
        images, *rest = batch
        return (images.unsqueeze(1).to(torch.float32).mul_(scale).add_(shift), *rest)

    return prepare


# The global order.


def permutation(num_examples: int, seed: int, epoch: int, shuffle: bool = True) -> Tensor:
    """The order of epoch `epoch`: int64 [num_examples] on the CPU, a pure function of its arguments."""
    if not shuffle:
        return torch.arange(num_examples)
    digest = hashlib.blake2b(f"order/{seed}/{epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randperm(num_examples, generator=generator)


def part(length: int, index: int, parts: int) -> tuple[int, int]:
    """Start and stop of part `index` when `length` things are dealt out as by torch.tensor_split."""
    size, extra = divmod(length, parts)
    start = index * size + min(index, extra)
    return start, start + size + (index < extra)


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
    """Raw tensors, how many examples they hold, and which; size 0 is one example that must not count.

    A process without an example in a small last batch still has to take part in the collectives of the backward pass.
    """

    raw: Tensors
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
    of how many this is. accumulate: micro-batches that its share of a batch is split into. Raises UserError where a
    batch has fewer examples than there are processes.
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
        self.steps_per_epoch = -(-len(examples) // batch_size)

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

    def rehearsal(self) -> GlobalBatch:
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
