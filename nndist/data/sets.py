"""Sets of examples, the global order in which they are visited, and each process's share of it.

Epoch e visits a permutation that is a pure function of (seed, e); batch b is a slice of it, and each process takes its
part of the slice. So a position in training is two integers, and the number of processes changes nothing.
"""

from __future__ import annotations

import copy
import hashlib
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from .. import machine
from ..errors import TrainingError, UserError, lost_a_worker
from . import batches
from .batches import Batch
from .examples import Collate, Decode, Examples, Failure, as_read
from .identity import checksum_of, fingerprint_of_files
from .randomness import ExampleRandom, drawn_of, times_of
from .transfer import copier, delivered

Tensors = tuple[Tensor, ...]
SAMPLED = 8
"""Examples that identify a streamed set."""


class ExampleSet(Protocol):
    """A set of examples that can be read in any order; the methods with a body suit most sets."""

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> ExampleSet:
        """The same set, delivering its batches on `device`."""
        ...

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """One raw batch for each tensor of example numbers, in their order."""
        ...

    def order(self, seed: int, epoch: int, shuffle: bool, batch_size: int) -> Tensor:
        """The order of training epoch `epoch`, int64 [number of examples] on the CPU; a pure function."""
        return permutation(len(self), seed, epoch, shuffle)

    def in_epoch(self, seed: int, epoch: int) -> ExampleSet:
        """The same set as training epoch `epoch` reads it, if reading draws random numbers."""
        return self

    def named(self, numbers: Tensor) -> Tensor:
        """The numbers by which a person knows these examples: a part of a set counts as the set does."""
        return numbers

    def fingerprint(self) -> str:
        """Identifies the examples to a resumed run; "" if that would take reading them all."""
        return ""


class Resident(ExampleSet):
    """Tensors that stay on the device; a batch is gathered there by index, without Python per example.

    tensors: tensors, or one dict, NamedTuple, dataclass or nesting of them; a batch has the same structure. All have
    the same first dimension, the number of examples; raises ValueError otherwise. Small types (uint8 images) save
    memory: `Data.prepare` turns a batch into the networks' input on the device.
    """

    numbers: Tensor | None = None  # in the set that this is a part of, int64 [number of examples], on the CPU

    def __init__(self, *tensors: Any):
        is_nested = len(tensors) == 1 and not isinstance(tensors[0], Tensor)
        self.tensors: Tensors = tuple(batches.tensors_of(tensors[0])) if is_nested else tensors
        self.whole: Batch = tensors[0] if is_nested else self.tensors
        batches.changed(self.whole, _tensors_only)
        for tensor in self.tensors:
            if why := _unfit(tensor):
                raise UserError(f"Resident: {why}")
        lengths = {len(tensor) for tensor in self.tensors}
        if len(lengths) != 1:
            raise ValueError(f"the tensors of a set must hold the same number of examples, not {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.tensors[0])

    def to(self, device: torch.device) -> Resident:
        if all(tensor.device == device for tensor in self.tensors):
            return self  # hooks may change it
        moved = copy.copy(self)  # with the methods and attributes of its class
        if self.whole is not self.tensors:
            moved.whole = batches.moved(self.whole, device)
            moved.tensors = tuple(batches.tensors_of(moved.whole))
        else:
            moved.whole = moved.tensors = tuple(tensor.to(device) for tensor in self.tensors)
        return moved

    def named(self, numbers: Tensor) -> Tensor:
        return numbers if self.numbers is None else self.numbers[numbers]

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        device = self.tensors[0].device
        for index in indices:
            index = index.to(device)
            if self.whole is self.tensors:
                yield tuple([tensor.index_select(0, index) for tensor in self.tensors])
            else:
                yield self._gather(index)

    def _gather(self, index: Tensor) -> Batch:
        def rows(part: Any) -> Any:
            return part.index_select(0, index) if isinstance(part, Tensor) else NotImplemented

        return batches.changed(self.whole, rows)

    def fingerprint(self) -> str:
        """The CRC-32 of the tensors' bytes."""
        return f"{checksum_of(self.tensors, 0):08x}"


def _unfit(tensor: Any) -> str:
    """Why a tensor can't hold examples, and the remedy; "" if it can."""
    if tensor.layout != torch.strided:
        return f"a tensor of layout {tensor.layout} has no rows to gather; give tensor.to_dense()"
    if not tensor.dim():
        return "a tensor without dimensions holds no examples; keep the number on the recipe"
    if tensor.requires_grad:
        return "a tensor takes gradients, and examples are not trained; give tensor.detach()"
    return ""


def _tensors_only(part: Any) -> Any:
    if part is None or isinstance(part, Tensor | bool | int | float):  # a number belongs to the whole set
        return part
    if isinstance(part, dict | list | tuple) or is_dataclass(part):
        return NotImplemented
    if hasattr(part, "__array__"):
        raise UserError(
            f"Resident: holds tensors, not {type(part).__name__}; give torch.from_numpy(...) or torch.tensor(...)"
        )
    raise ValueError(f"a Resident set holds tensors, not {type(part).__name__}; leave that out, or stream it")


class Streamed(ExampleSet):
    """A map-style dataset that does not fit in memory: torch's DataLoader reads batches in worker processes.

    `dataset[i]` returns a tensor, a number, or any nesting of them in tuples, lists, dicts, NamedTuples and
    dataclasses, or anything that `decode` turns into one; texts and None are kept. `decode(dataset[i], random)` also
    runs in the workers; in training `random` is an ExampleRandom of that one example, elsewhere None. The examples of a
    batch are stacked part by part, or turned into a batch by `collate`, which is given their list.

    All of them may draw random numbers, from the global generators of Python, NumPy and torch or from their own: these
    are seeded by (seed, epoch, i) while example i is read, so it is the same on any number of workers and processes and
    after a resume, and outside training the same each time; one that an order() repeats in an epoch is drawn for anew
    each time. What `collate` draws is a function of its batch's first example; as each process collates its own part of
    a batch, it is exact after a resume but not with a different number of processes. Other sources, such as a
    `numpy.random.default_rng()` created for each example, are not exact.

    A UserError raised by any of them ends the run with its one line, any other exception with an ExampleError that
    names the example. If the dataset has a `fingerprint`, a text, it identifies the examples to a resumed run and to
    other processes; those of torchvision's folders are known by their files' names, all others by a few of
    their examples. What a dataset or `collate` changes in itself while it is read, such as a count of batches, stays in
    the process that reads it: with worker processes it is lost after each epoch, and by a resume. Raises UserError for
    a DataLoader, and for a dataset without a length or without examples by number.
    """

    def __init__(
        self, dataset: Any, num_workers: int = 2, decode: Decode | None = None, collate: Collate | None = None
    ):
        check_is_map_style(dataset)
        self.dataset = dataset
        self.num_workers = num_workers
        self.decode = decode
        self.collate = collate
        self.device = torch.device("cpu")
        self.epoch_of_training: tuple[int, int] | None = None  # seed and epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def to(self, device: torch.device) -> Streamed:
        if self.device == device:
            return self  # hooks may change it
        moved = copy.copy(self)
        moved.device = device
        return moved

    def in_epoch(self, seed: int, epoch: int) -> Streamed:
        there = copy.copy(self)
        there.epoch_of_training = (seed, epoch)
        return there

    def fingerprint(self) -> str:
        text = getattr(self.dataset, "fingerprint", "")
        return (text if isinstance(text, str) else "") or fingerprint_of_files(self.dataset) or self._of_some()

    def _of_some(self) -> str:
        """What some examples are, for `same_examples`; "" if they can't be read, or differ when they are read again."""
        numbers = sorted({len(self) * number // SAMPLED for number in range(SAMPLED)} if len(self) else ())
        examples, checksums = Examples(self.dataset, self.decode, list, None), []
        for number in (*numbers, *numbers[:2]):
            read = examples.__getitems__([number])
            if isinstance(read, Failure):
                return ""
            about: list[float] = []
            checksums.append((checksum_of(read.batch, 0, about), about))
        first = checksums[: len(numbers)]
        if repr(first[:2]) != repr(checksums[len(numbers) :]):
            return ""
        told = " ".join(f"{value:.6g}" for _, about in first for value in about)
        return f"some/{told}/{zlib.crc32(repr([checksum for checksum, _ in first]).encode()):08x}"

    @property
    def workers(self) -> int:
        """The worker processes that read it.

        A forked one has the recipe's module; a spawned one would have to import it and can't. Windows has no fork, and
        macOS ends forked processes that use some of its libraries.
        """
        can_fork = sys.platform != "darwin" and "fork" in torch.multiprocessing.get_all_start_methods()
        return self.num_workers if can_fork else 0

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        from torch.utils.data import DataLoader

        pinned = self.device.type == "cuda"
        num_workers = self.workers
        if num_workers:
            machine.allow_open_files()  # each tensor that a worker process sends is one
        loader = DataLoader(
            cast(Any, Examples(self.dataset, self.decode, self.collate, self.epoch_of_training)),
            # torch asks for batches of indices only as fast as its workers read, so an epoch's list may be lazy
            batch_sampler=cast(Any, (drawn_of(index, times_of(index)) for index in indices)),
            num_workers=num_workers,
            multiprocessing_context="fork" if num_workers else None,
            # one that hangs in a dataset would outlive a killed training, holding its memory and files
            worker_init_fn=_end_with_training if num_workers else None,
            collate_fn=cast(Any, as_read),
            pin_memory=pinned,
            # else its iterator would draw from the global generator, and dropout would depend on it
            generator=torch.Generator(),
        )

        def read() -> Iterator[Batch]:
            try:
                for found in loader:
                    if isinstance(found, Failure):
                        raise found.error()
                    yield found.batch
            except (RuntimeError, ConnectionError, EOFError) as error:
                lost: Exception = error
                try:
                    if not isinstance(error, RuntimeError):  # no more comes from a worker: torch's handler says why
                        time.sleep(1.0)
                except RuntimeError as why:
                    lost = why
                if line := lost_a_worker(lost):
                    raise TrainingError(line) from lost
                raise

        yield from delivered(read(), copier(self.device, num_workers))


def reads_in_workers(examples: Any) -> bool:
    """Whether worker processes read a set, or the one that it is a part of."""
    return any(isinstance(one, Streamed) and one.workers > 0 for one in with_wholes(examples))


def with_wholes(examples: Any) -> Iterator[Any]:
    """A set, the set that it is a part of, and so on."""
    while hasattr(type(examples), "batches"):
        yield examples
        whole = getattr(examples, "whole", None)
        examples = whole if hasattr(type(whole), "batches") else getattr(examples, "examples", None)


def _end_with_training(worker: int) -> None:
    machine.end_with_parent()


def check_is_map_style(dataset: Any) -> None:
    """Raises UserError for a dataset without examples by number, with what to give instead."""
    from torch.utils.data import DataLoader, IterableDataset

    kind = type(dataset).__name__
    if isinstance(dataset, DataLoader):
        raise UserError(f"Streamed({kind}): a data loader has its own order; give {_of_loader(dataset)}")
    if isinstance(dataset, IterableDataset):
        raise UserError(
            f"Streamed({kind}): an IterableDataset can't be read in any order or from the middle, so no run on it "
            "could be resumed exactly; give a map-style dataset (__len__ and __getitem__), or write its examples to "
            "shards (nndist.data.shards.write_shards)"
        )
    for name, what in (("__len__", "number of examples"), ("__getitem__", "example of a number from 0")):
        if not hasattr(dataset, name):
            raise UserError(f"Streamed({kind}): has no {name}; define it to return the {what}")
    if isinstance(dataset, Mapping) and any(number not in dataset for number in range(len(dataset))):
        keys = ", ".join(map(repr, list(dataset)[:3]))
        raise UserError(
            f"Streamed({kind}): its keys are {keys} and not the numbers of examples from 0; give one of its datasets, "
            f"such as Streamed(sets[{next(iter(dataset))!r}]), or Resident(tensors) for a dict of tensors"
        )


def _of_loader(loader: Any) -> str:
    from torch.utils.data import RandomSampler, SequentialSampler, default_collate

    options = f", num_workers={loader.num_workers}"
    options += "" if loader.collate_fn is default_collate else ", collate=loader.collate_fn"
    own = "" if isinstance(loader.sampler, RandomSampler | SequentialSampler) else type(loader.sampler).__name__
    what = f", of a subclass whose order(seed, epoch, ...) draws as its {own} does" if own else ""
    return f"Streamed(loader.dataset{options}){what}, and the recipe's batch_size"


def _check_is_example_set(given: Any, name: str) -> None:
    """Raises UserError for anything but an ExampleSet, with the code that makes it one."""
    if hasattr(given, "batches") and hasattr(given, "to"):
        return
    from torch.utils.data import DataLoader, TensorDataset

    if isinstance(given, DataLoader):
        remedy = _of_loader(given)
    elif isinstance(given, TensorDataset):
        remedy = "Resident(*dataset.tensors)"
    elif isinstance(given, Tensor):
        remedy = "Resident(tensor)"
    elif isinstance(given, list | tuple) and given and all(isinstance(part, Tensor) for part in given):
        remedy = "Resident(*tensors)"
    elif isinstance(given, dict) and given and all(isinstance(part, Tensor) for part in given.values()):
        remedy = "Resident(tensors)"
    else:
        remedy = "Resident(x, y) of tensors that fit in memory, or Streamed(dataset)"
    raise UserError(f"Data({name}={type(given).__name__}): is not a set of examples; give {remedy}")


def as_is(batch: Batch) -> Batch:
    """The default `prepare`: the raw batch is the networks' input."""
    return batch


def keeps_order(examples: ExampleSet, numbers: Tensor, prepare: Callable[[Batch], Batch] = as_is) -> bool:
    """Whether a batch has its examples in the order of their numbers: a `collate` may sort them, such as by length.

    It is seen in tensors of one number per example, such as labels or lengths, of up to 30 examples. Examples that
    can't be read one by one are taken to be in order.
    """
    numbers = numbers[:30]
    if isinstance(examples, Resident) or len(numbers) < 2:
        return True
    parts = [numbers, *numbers.split(1)]
    try:
        together, *alone = (list(batches.tensors_of(prepare(raw))) for raw in examples.batches(parts))
    except Exception:  # the recipe's own code was only ever meant for whole batches
        return True
    for place, tensor in enumerate(together):
        rows = [one[place] for one in alone if place < len(one) and one[place].shape == (1,)]
        if tensor.shape == numbers.shape == (len(rows),):
            own = torch.cat(rows)
            if not torch.equal(own, tensor) and torch.equal(own.sort()[0], tensor.sort()[0]):
                return False
    return True


@dataclass
class Data:
    """What a recipe trains and is tested on.

    source: what the examples are, for people ("MNIST", "MNIST sample", "generated").
    prepare: turns a raw batch into the networks' input; it runs on the device.
    augment: changes a prepared training batch at random, using only the given ExampleRandom.
    more: further sets to evaluate, by name, besides "test".
    classes: the names of the classes, if any.
    note: one line to show before training, such as that a sample replaces the real set.
    val: the validation set, which chooses the best model and the end of training. With one, the test set is evaluated
        only once, at the end, with the chosen weights.
    plan: further lines of the plan, by a name of at most 8 letters, such as the classes' numbers of examples.
    sequential: the examples follow each other in time or overlap, so `parts.hold_out` takes the last ones.
    for_evaluation: turns held-out training examples into a set to evaluate, if test examples are of a different form,
        such as ones with fixed noise that `augment` draws in training.
    as_text: an example's tokens, [length], which begin a prepared batch, as a text that a person reads.

    Raises ValueError if one of `more` is called train, test or, beside a validation set, val, and UserError for
    anything but a set of examples, such as a DataLoader.
    """

    train: ExampleSet
    test: ExampleSet = None  # type: ignore[assignment]  # refused below
    source: str = "generated"
    prepare: Callable[[Any], Batch] = as_is
    augment: Callable[[Any, ExampleRandom], Batch] | None = None
    more: dict[str, ExampleSet] = field(default_factory=dict)
    classes: Sequence[str] = ()
    note: str = ""
    plan: dict[str, str] = field(default_factory=dict)
    val: ExampleSet | None = None
    sequential: bool = False
    for_evaluation: Callable[[Any], ExampleSet] | None = None
    as_text: Callable[[Tensor], str] | None = None

    def __post_init__(self) -> None:
        _check_is_example_set(self.train, "train")
        if self.test is None:
            raise UserError(
                "Data(test=None): is not a set of examples; give some that are not trained on, such as the last tenth, "
                "Resident(x[-n:], y[-n:])"
            )
        if taken := {"train", "test", *(["val"] if self.val is not None else [])} & self.more.keys():
            raise ValueError(f"a further set can't be called {taken.pop()!r}: its scores would mix with others")
        for name, examples in self.sets().items():
            _check_is_example_set(examples, name)

    def to(self, device: torch.device) -> Data:
        """The same data, delivered on `device`."""
        moved: dict[int, ExampleSet] = {}  # `more` often has the training set again: one copy on the device

        def move(examples: ExampleSet) -> ExampleSet:
            return moved.setdefault(id(examples), examples.to(device))

        return replace(
            self,
            train=move(self.train),
            test=move(self.test),
            more={name: move(examples) for name, examples in self.more.items()},
            val=None if self.val is None else move(self.val),
        )

    def sets(self) -> dict[str, ExampleSet]:
        """Every set by its name."""
        return {"train": self.train, **self.evaluation_sets()}

    def evaluation_sets(self) -> dict[str, ExampleSet]:
        """Every set that is evaluated, by its name in scores."""
        return self.sets_in_training() | self.sets_at_end()

    def given(self) -> dict[str, Any]:
        """What of the recipe's code and objects it holds, by name."""
        sets = {f"data.{name}": examples for name, examples in self.sets().items()}
        return {"data.prepare": self.prepare, "data.augment": self.augment, **sets}

    def fingerprints(self) -> dict[str, str]:
        """Of each set, by its name; see `ExampleSet.fingerprint`."""
        known: dict[int, str] = {}
        for examples in self.sets().values():
            if id(examples) not in known:
                known[id(examples)] = examples.fingerprint()
        return {name: known[id(examples)] for name, examples in self.sets().items()}

    def sets_in_training(self) -> dict[str, ExampleSet]:
        """The sets of each evaluation during training."""
        return {"test": self.test, **self.more} if self.val is None else {"val": self.val, **self.more}

    def sets_at_end(self) -> dict[str, ExampleSet]:
        """The sets that are evaluated once, after training."""
        return {} if self.val is None else {"test": self.test}

    def inputs(self, examples: ExampleSet, start: int = 0, stop: int | None = None) -> Batch:
        """Examples `start` to `stop` (default: the end) of a set, prepared, in one batch; for figures."""
        stop = len(examples) if stop is None else min(stop, len(examples))
        return self.prepare(next(iter(examples.batches([torch.arange(start, stop)]))))


def scale_images(mean: float, std: float) -> Callable[[Tensors], Tensors]:
    """A `prepare` for (images, labels): uint8 [k, 28, 28] -> float [k, 1, 28, 28], (x / 255 - mean) / std."""
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
    """Start and stop of part `index` of `length` items, split as by torch.tensor_split."""
    size, extra = divmod(length, parts)
    start = index * size + min(index, extra)
    return start, start + size + (index < extra)
