"""Reads the examples of a batch in a worker process or this one: seeds, decodes, collates; returns errors as text."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ExampleError, LoaderTraceback, UserError, first_line, place_of
from . import batches
from .batches import Batch
from .randomness import ExampleRandom, Generators, Repeat

Decode = Callable[[Any, "ExampleRandom | None"], Any]
"""Turns a dataset's item into an example for a batch (see data.Streamed)."""
Collate = Callable[[list[Any]], Batch]
"""Turns a list of examples into a batch."""


@dataclass
class Read:
    """A batch as a worker process sends it; it pins its own tensors for DataLoader, also those in dataclasses."""

    batch: Batch

    def pin_memory(self) -> Read:
        return Read(batches.pinned(self.batch))


@dataclass
class Failure:
    """An error as text, since not every exception can be pickled or recreated.

    line: for a person. trace: the traceback; "" if the line is enough.
    """

    line: str
    trace: str = ""

    def pin_memory(self) -> Failure:
        return self

    def error(self) -> UserError:
        """The error to raise for it; its cause shows where it came from."""
        if not self.trace:
            return UserError(self.line)
        error = ExampleError(self.line)
        error.__cause__ = LoaderTraceback(self.trace)
        return error


class Examples:
    """The batches of a dataset by example numbers, for torch's DataLoader.

    While an example is read and decoded, the generators that its code can draw from (see Generators) are seeded by
    (seed, epoch, example and, if it was there before in the epoch, how often), and while a batch is collated by its
    first example; outside training there is neither seed nor epoch, so every reading is identical. epoch_of_training:
    (seed, epoch), None outside training.
    """

    def __init__(
        self, dataset: Any, decode: Decode | None, collate: Collate | None, epoch_of_training: tuple[int, int] | None
    ):
        self.dataset, self.decode, self.collate = dataset, decode, collate
        self.epoch_of_training = epoch_of_training
        self.generators: Generators | None = None  # of the process that reads

    def __getitems__(self, numbers: list[int]) -> Read | Failure:
        """The batch of these examples, or the failure of the first that can't be read."""
        from torch.utils.data import get_worker_info

        is_loader = get_worker_info() is not None
        is_first = self.generators is None
        try:
            generators = self.generators = self.generators or self._find_generators()
            with contextlib.nullcontext() if is_loader else generators.kept():
                read = self._read(numbers, generators)
            if is_first and not generators.same_as(later := self._find_generators()):
                # The first batch created generators and drew from them unseeded: it is read again
                self.generators = later
                with contextlib.nullcontext() if is_loader else later.kept():
                    read = self._read(numbers, later)
        except UserError as error:  # a generator that can't be seeded
            return Failure(str(error))
        return _sendable(read) if is_loader and is_first else read

    def _find_generators(self) -> Generators:
        return Generators(dataset=self.dataset, decode=self.decode, collate=self.collate)

    def _read(self, numbers: list[int], generators: Generators) -> Read | Failure:
        examples: list[Any] = []
        doing = ""
        seed, epoch = self.epoch_of_training or ("", "evaluation")
        try:
            for drawn in numbers:
                generators.seed(f"example/{seed}/{epoch}/{drawn}")
                number = int(drawn)  # the dataset sees no Repeat
                doing = f"dataset[{number}]"
                example = self.dataset[number]
                if self.decode is not None:
                    doing = f"decode of dataset[{number}]"
                    example = self.decode(example, self._random(drawn))
                examples.append(example)
            doing = f"the batch of examples {_shown(numbers)}"
            if self.collate is None:
                batch = batches.stacked(examples)
                batch = (batch,) if isinstance(batch, Tensor) else tuple(batch) if type(batch) is list else batch
            else:
                generators.seed(f"collate/{seed}/{epoch}/{numbers[0]}")
                batch = self.collate(examples)
        except UserError as error:
            return Failure(str(error))
        except Exception as error:
            line = f"{type(error).__name__} in {doing}: {first_line(error)}{place_of(error)}; --traceback shows more"
            return Failure(line, "".join(traceback.format_exception(error)))
        return Read(batch)

    def _random(self, drawn: int) -> ExampleRandom | None:
        if self.epoch_of_training is None:
            return None
        times = torch.tensor([drawn.times]) if isinstance(drawn, Repeat) else None
        return ExampleRandom(*self.epoch_of_training, torch.tensor([int(drawn)]), "decode", times)


def as_read(read: Read | Failure) -> Read | Failure:
    """DataLoader's collate function: the batch is already collated."""
    return read


def _sendable(read: Read | Failure) -> Read | Failure:
    """The same, or a Failure if a part of the batch can't be sent: the receiver would wait for ever."""
    from multiprocessing.reduction import ForkingPickler

    def without_tensors(part: Any) -> Any:
        if isinstance(part, Tensor):
            return None
        return type(part) if callable(getattr(part, "to", None)) else NotImplemented

    try:
        ForkingPickler.dumps(batches.changed(read, without_tensors))
    except Exception as error:
        return Failure(
            f"a batch can't be sent from a worker process ({type(error).__name__}: {first_line(error)}); define its "
            "class at the top of a module, or give Streamed num_workers=0"
        )
    return read


def _shown(numbers: Sequence[int]) -> str:
    few = ", ".join(str(int(number)) for number in numbers[:3])
    return f"{few} and {len(numbers) - 3} more" if len(numbers) > 3 else few
