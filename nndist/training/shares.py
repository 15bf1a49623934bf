"""A process's share of a step given to another one: its examples, and all that its passes start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.batches import Batch, changed
from ..data.feed import GlobalBatch, MicroBatch
from ..distributed.exchange import exchanged, laid_out
from ..errors import TrainingError, UserError
from ..runs import random_state
from ..runs.python_state import Change
from ..runs.python_undo import CanNotBeUndone, Remembered

if TYPE_CHECKING:
    from .trainer import Trainer


@dataclass
class Share:
    """What a process computes from: batch, random state, buffers, Python objects."""

    batch: GlobalBatch
    random: tuple[dict[str, Tensor], dict[str, Any]]
    buffers: list[Tensor]
    changes: list[Change]


@dataclass
class Packed:
    """This process's share as it can be sent: JSON-like, and copies of tensors, which no pass changes."""

    batch: GlobalBatch
    told: Any
    tensors: list[Tensor]
    python: Remembered


def packed(trainer: Trainer, batch: GlobalBatch) -> Packed:
    """This process's share now; a collective. Raises UserError for batches that can't be sent."""
    tensors: list[Tensor] = []

    def sent(given: list[Tensor]) -> list[int]:
        tensors.extend(laid_out(tensor.detach().clone(), tensor.stride()) for tensor in given)
        return [len(tensors) - len(given), len(tensors)]

    python = remembered(trainer)

    parts = [parts_of(micro.raw, is_sent=trainer.runtime.world_size > 1) for micro in batch.micro_batches]
    micros = [
        [micro.size, sent([micro.numbers] if micro.times is None else [micro.numbers, micro.times]), sent(held), plain]
        for micro, (held, plain) in zip(batch.micro_batches, parts, strict=True)
    ]
    random, rest = random_state.random_state(trainer.runtime.device)
    names = sorted(random)
    changes = [
        [
            list(change.path),
            change.value,
            sorted(change.tensors),
            sent([change.tensors[n] for n in sorted(change.tensors)]),
        ]
        for change in changes_of(trainer)
    ]
    told = [micros, sent([random[name] for name in names]), rest, sent(buffers_of(trainer)), changes]
    return Packed(batch, told, tensors, python)


def share_of(trainer: Trainer, own: Packed, distance: int) -> Share:
    """The share of process `rank + distance`; a collective."""
    batch = own.batch
    told, held = exchanged(trainer.runtime, own.told, own.tensors, distance)
    micros, (first, last), rest, of_buffers, changes = told

    def among(span: list[int]) -> list[Tensor]:
        return held[span[0] : span[1]]

    return Share(
        GlobalBatch(
            batch.epoch,
            batch.index,
            batch.size,
            tuple(
                MicroBatch(with_parts(micro.raw, among(raw), plain), size, *among(numbers))
                for micro, (size, numbers, raw, plain) in zip(batch.micro_batches, micros, strict=True)
            ),
        ),
        (
            dict(zip(sorted(random_state.random_state(trainer.runtime.device)[0]), held[first:last], strict=True)),
            rest,
        ),
        among(of_buffers),
        [Change(tuple(path), value, dict(zip(keys, among(span), strict=True))) for path, value, keys, span in changes],
    )


class Borrowed:
    """Context manager: puts this process into the state that a share starts from, and back into its own afterwards.

    Raises TrainingError for an object that can't be put back.
    """

    def __init__(self, trainer: Trainer, share: Share, python: Remembered, *, again: bool):
        """python: this process's own objects as they were. again: whether passes have changed them since."""
        self.trainer, self.share, self.python, self.again = trainer, share, python, again

    def __enter__(self) -> None:
        trainer, share = self.trainer, self.share
        if self.again:
            self._put_back()
        self.put_back_random_state_and_buffers = random_state.repeatable(trainer.networks, trainer.runtime.device)
        parameters = [parameter for network in trainer.networks.values() for parameter in network.parameters()]
        self.gradients = [(parameter, parameter.grad) for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        with torch.no_grad():
            for own, other in zip(buffers_of(trainer), share.buffers, strict=True):
                if not torch.equal(own, other):  # equal ones keep their version, by which changes are noticed
                    own.copy_(other)
        if trainer.runtime.world_size > 1:
            trainer.python_state.restore(share.changes)
        random_state.set_random_state(*share.random, trainer.runtime.device)

    def __exit__(self, *error: object) -> None:
        self._put_back()
        self.put_back_random_state_and_buffers()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient

    def _put_back(self) -> None:
        try:
            self.python.put_back()
        except CanNotBeUndone as value:
            raise TrainingError(refused(str(value))) from None


def remembered(trainer: Trainer) -> Remembered:
    """The values of Python objects now; raises UserError for what only advances."""
    try:
        return Remembered(trainer.python_state)
    except CanNotBeUndone as value:
        raise UserError(refused(str(value))) from None


def refused(name: str) -> str:
    """The line for a value that a second pass would change for good."""
    return (
        f"--recheck-every: {name} is changed by a pass and can't be put back, so that taking a step twice would change "
        "training; keep a number or a list there, or leave the flag out"
    )


def buffers_of(trainer: Trainer) -> list[Tensor]:
    """The buffers, which may differ between processes in the middle of a step."""
    return [buffer for network in trainer.networks.values() for buffer in network.buffers()]


def changes_of(trainer: Trainer) -> list[Change]:
    """The values of all Python objects that have changed on any process since the start, as this one has them."""
    if trainer.runtime.world_size == 1:
        return []
    changes, _ = trainer.python_state.changes()
    everyones = trainer.runtime.gather_objects([list(change.path) for change in changes])
    own = {change.path for change in changes}
    others = {tuple(path) for paths in everyones for path in paths} - own
    return changes + (trainer.python_state.values(others) if others else [])


def parts_of(batch: Batch, *, is_sent: bool) -> tuple[list[Tensor], list[Any]]:
    """A batch's tensors and plain values, in order; raises UserError for other values if they are to be sent."""
    tensors: list[Tensor] = []
    plain: list[Any] = []

    def keep(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return value
        if value is None or isinstance(value, bool | int | float | str):
            plain.append(value)
            return value
        if not is_sent or isinstance(value, Mapping | list | tuple) or hasattr(value, "__dataclass_fields__"):
            return NotImplemented
        raise UserError(
            f"--recheck-every: batches hold a {type(value).__name__}, which processes can't send each other; make it a "
            "tensor, or leave the flag out"
        )

    changed(batch, keep)
    return tensors, plain


def with_parts(like: Batch, tensors: list[Tensor], plain: list[Any]) -> Batch:
    """A batch of the form of `like` with these parts."""
    rest, others = iter(tensors), iter(plain)

    def put(value: Any) -> Any:
        if isinstance(value, Tensor):
            return next(rest)
        if value is None or isinstance(value, bool | int | float | str):
            return next(others)
        return NotImplemented

    return changed(like, put)
