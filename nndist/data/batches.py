"""Batches of any nesting: dicts, lists, tuples, NamedTuples and dataclasses of tensors and other values.

Tensors are moved, pinned and gathered at any depth; strings, numbers and None are kept. An object with its own method
for it, such as a PackedSequence, moves itself.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

Batch = Any
"""A tensor, or any nesting of tensors and other values."""


def moved(batch: Batch, device: torch.device, *, non_blocking: bool = False) -> Batch:
    """The batch with its tensors on `device`; other objects that have a method `to` are moved by it."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=non_blocking)
        if callable(getattr(value, "to", None)):
            there = value.to(device)
            return value if there is None else there  # some move in-place and return nothing
        return NotImplemented

    return changed(batch, move)


def pinned(batch: Batch) -> Batch:
    """The batch with its tensors in page-locked memory, from which copies to a GPU are asynchronous."""

    def pin(value: Any) -> Any:
        return value.pin_memory() if callable(getattr(value, "pin_memory", None)) else NotImplemented

    return changed(batch, pin)


def changed(batch: Batch, change: Callable[[Any], Any]) -> Batch:
    """A copy with `change` applied to every part; if it returns NotImplemented, to the part's own parts.

    Containers keep their types. A dataclass is copied without calling `__init__`, so one that computes its fields keeps
    them.
    """
    replacement = change(batch)
    if replacement is not NotImplemented:
        return replacement
    if isinstance(batch, Mapping):
        values = {key: changed(value, change) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return values
        twin = copy.copy(batch)  # keeps what it holds besides its items, such as a default_factory
        twin.update(values)
        return twin
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*[changed(value, change) for value in batch])
    if isinstance(batch, list | tuple):
        return type(batch)([changed(value, change) for value in batch])
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        other = copy.copy(batch)
        for field in dataclasses.fields(batch):
            if hasattr(batch, field.name):  # one with init=False may not be set
                object.__setattr__(other, field.name, changed(getattr(batch, field.name), change))  # it may be frozen
        return other
    return batch


def tensors_of(batch: Batch) -> Iterator[Tensor]:
    """Every tensor of a batch, in order; not those in objects that are not containers."""
    return (tensor for _, tensor in named_tensors(batch))


def named_tensors(batch: Batch, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a batch, in order, with its place, such as "logits" or "hidden.0"; "" for the batch itself."""
    if isinstance(batch, Tensor):
        yield name, batch
        return
    parts: list[tuple[Any, Any]] = []
    if isinstance(batch, Mapping):
        parts = list(batch.items())
    elif isinstance(batch, tuple) and hasattr(batch, "_fields"):
        parts = list(zip(batch._fields, batch, strict=True))
    elif isinstance(batch, list | tuple):
        parts = list(enumerate(batch))
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        names = [field.name for field in dataclasses.fields(batch)]
        parts = [(one, getattr(batch, one)) for one in names if hasattr(batch, one)]
    for key, part in parts:
        yield from named_tensors(part, f"{name}.{key}" if name else str(key))


def stacked(examples: Sequence[Any]) -> Batch:
    """Collates examples into a batch, part by part: tensors and arrays are stacked, numbers become a tensor.

    Texts and other objects become a list, and None stays None if every example has it. Raises UserError for examples
    that do not fit together, such as tensors of different lengths.
    """
    first = next((example for example in examples if example is not None), None)
    if first is None:
        return None
    if any(example is None for example in examples):
        if isinstance(first, str) or not _is_stacked(first):
            return list(examples)
        kind = type(first).__name__
        raise UserError(f"a part of an example is None in some examples of a batch and a {kind} in others; {_REMEDY}")
    if isinstance(first, Mapping):
        if any(example.keys() != first.keys() for example in examples):
            raise UserError(f"the examples of a batch have different keys, such as {_differing(examples)}; {_REMEDY}")
        return {key: stacked([example[key] for example in examples]) for key in first}
    if isinstance(first, list | tuple):
        if any(len(example) != len(first) for example in examples):
            lengths = sorted({len(example) for example in examples})
            raise UserError(f"the examples of a batch have {lengths[0]} to {lengths[-1]} parts; {_REMEDY}")
        parts = [stacked(part) for part in zip(*examples, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        twin = copy.copy(first)
        for field in dataclasses.fields(first):
            parts = [getattr(example, field.name) for example in examples]
            object.__setattr__(twin, field.name, stacked(parts))
        return twin
    if _is_stacked(first):
        from torch.utils.data import default_collate

        shapes = {tuple(example.shape) for example in examples if hasattr(example, "shape")}
        if len(shapes) > 1:
            what = "tensors" if isinstance(first, Tensor) else "arrays"
            some = " and ".join(str(list(shape)) for shape in sorted(shapes)[:2])
            raise UserError(f"the examples of a batch have {what} of shapes {some}; {_REMEDY}")
        return default_collate(list(examples))
    return list(examples)


def _is_stacked(value: Any) -> bool:
    """Whether values of this kind become a tensor in a batch, or hold parts that do."""
    if isinstance(value, Tensor | int | float | complex | Mapping | list | tuple):
        return True
    return type(value).__module__ == "numpy" or (dataclasses.is_dataclass(value) and not isinstance(value, type))


_REMEDY = "make them match in the dataset, or give Streamed(dataset, collate=...) a function that makes the batch"


def _differing(examples: Sequence[Mapping[Any, Any]]) -> str:
    first = examples[0].keys()
    return next(repr(key) for example in examples for key in sorted(example.keys() ^ first, key=repr))


def inputs_and_labels(batch: Batch, what: str) -> tuple[Tensor, Tensor]:
    """The first two tensors of a batch; raises UserError if it is not a tuple that begins with them.

    what: what needs them, and the alternative, for the error line.
    """
    if isinstance(batch, list | tuple) and len(batch) >= 2 and all(isinstance(part, Tensor) for part in batch[:2]):
        return batch[0], batch[1]
    raise UserError(f"{what}: its batches are {kind_of(batch)} and not (inputs, labels)")


def inputs_and_classes(batch: Batch, *, last: bool, what: str) -> tuple[list[Any], Tensor]:
    """The parts of a classifier's batch that its network takes, and the labels, integers [k].

    last: the labels are the last part, all others are inputs. Otherwise the input is the first part, and the labels the
    only integers [k] after it. Raises UserError, with `what`, if there are no labels, or several parts may be.
    """
    parts = list(batch) if isinstance(batch, list | tuple) else []
    after = parts[-1:] if last else parts[1:]
    found = [part for part in after if isinstance(part, Tensor) and part.dim() == 1 and not part.is_floating_point()]
    if len(parts) < 2 or len(found) != 1:
        raise UserError(f"{what}: its batches are {kind_of(batch)}, with no label, or several, in each example")
    return (parts[:-1] if last else parts[:1]), found[0]


def first_tensor(batch: Batch, what: str) -> Tensor:
    """The first tensor of a tuple or list of tensors; raises UserError, with `what`, for any other batch."""
    if isinstance(batch, list | tuple) and batch and all(isinstance(part, Tensor) for part in batch):
        return batch[0]
    raise UserError(f"{what}: its batches are {kind_of(batch)} and not tuples of tensors")


def kind_of(batch: Batch) -> str:
    """What a batch is, for an error line."""
    if isinstance(batch, Mapping):
        return f"dicts of {', '.join(map(str, batch))}"
    if isinstance(batch, list | tuple):
        return f"({', '.join(type(part).__name__ for part in batch)})"
    return f"of type {type(batch).__name__}"
