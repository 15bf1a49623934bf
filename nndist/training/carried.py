"""Notes what passes change in networks, or beside them, so that results depend on how batches are split."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..distributed.blocks import local
from ..runs.python_undo import same
from .plain_losses import noting_plain_losses

if TYPE_CHECKING:
    from .trainer import Trainer

MOST_NUMBERS = 1000
"""Of a parameter, that are compared, about."""
MOST_ITEMS = 100
"""Of a list or dict of the recipe's, in which modules are looked for."""


@contextlib.contextmanager
def noting_in_first_step(trainer: Trainer) -> Iterator[None]:
    """Context manager around the first step: the notes below, and that of losses whose mean is not torch's."""
    with noting_what_is_carried(trainer), noting_what_is_not_averaged(trainer), noting_plain_losses(trainer):
        yield


@contextlib.contextmanager
def noting_what_is_carried(trainer: Trainer) -> Iterator[None]:
    """Context manager around the first step: notes what a network carries from one micro-batch to the next.

    Such as a hidden state kept by row, a codebook that each forward pass updates, or a momentum encoder that it moves;
    but for running statistics of normalisation layers.
    """
    if trainer.feed.accumulate == 1:
        yield
        return
    carried: dict[str, None] = {}

    def noting(name: str, objective: Callable[..., Any]) -> Callable[..., Any]:
        before: dict[str, Any] = {}

        def call(*arguments: Any) -> Any:
            given = objective(*arguments)
            now = _kept_in(trainer)
            if before:  # what the first micro-batch makes, such as a table, the next one may only read
                carried.update(dict.fromkeys(name for name in now if not _same(before["values"].get(name), now[name])))
            before["values"] = now
            return given

        return call

    with trainer.optimizer_step.watched(noting):
        yield
    if carried:
        names = list(carried)
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        trainer.tracker.say(
            f"note     {shown}: changed by the forward pass of each micro-batch, and a step has "
            f"{trainer.feed.accumulate} of them, each of other examples: results may depend on --accumulate"
        )


@contextlib.contextmanager
def noting_what_is_not_averaged(trainer: Trainer) -> Iterator[None]:
    """Context manager around the first step: notes modules of the recipe whose buffers each process changes by itself.

    Such as a teacher with BatchNorm, or a loss that keeps a centre: only those of the networks are averaged.
    """
    if trainer.runtime.world_size == 1:
        yield
        return

    def buffers() -> dict[str, dict[str, Tensor]]:
        return {
            name: {key: buffer.clone() for key, buffer in module.named_buffers() if buffer.layout == torch.strided}
            for name, module in _held_beside(trainer).items()
        }

    before = buffers()
    yield
    changed = [
        name
        for name, now in buffers().items()
        if name in before and any(not _same(before[name].get(key), buffer) for key, buffer in now.items())
    ]
    if changed:
        trainer.tracker.say(
            f"note     {', '.join(changed)}: changed by each process's own examples, as BatchNorm's statistics are, "
            "and not averaged over the processes, as it is none of the networks: results depend on their number; "
            "return it in networks(), without an objective"
        )


def _held_beside(trainer: Trainer) -> dict[str, nn.Module]:
    """The modules that the recipe's attributes hold, also in lists and dicts, beside its networks; by name."""
    known = {id(module) for network in trainer.networks.values() for module in network.modules()}
    found: dict[str, nn.Module] = {}

    def look(name: str, value: Any, depth: int) -> None:
        if isinstance(value, nn.Module):
            if not known.intersection(map(id, value.modules())):
                known.update(map(id, value.modules()))
                found[name] = value
                return
            if id(value) not in known:  # it holds a network, or a part of one
                known.add(id(value))
                for key, module in value.named_children():
                    look(f"{name}.{key}", module, depth)
        elif depth and isinstance(value, dict) and len(value) <= MOST_ITEMS:
            for key, item in list(value.items()):
                look(f"{name}[{key!r}]", item, depth - 1)
        elif depth and isinstance(value, list | tuple) and len(value) <= MOST_ITEMS:
            for number, item in enumerate(value):
                look(f"{name}[{number}]", item, depth - 1)

    for key, value in list(vars(trainer.recipe).items()):
        look(f"recipe.{key}", value, 2)
    return found


def _kept_in(trainer: Trainer) -> dict[str, Any]:
    """What the networks, and modules beside them, keep by name, and changed Python values of the networks.

    It is their buffers, except of normalisation, and parameters that no step trains, of large ones some numbers.
    """
    groups = (group for optimizer in trainer.optimizers.values() for group in optimizer.param_groups)
    trained = {id(p) for group in groups for p in group["params"] if p.requires_grad}
    found: dict[str, Any] = {}
    for name, network in {**trainer.networks, **_held_beside(trainer)}.items():
        for prefix, module in network.named_modules():
            buffers = {} if isinstance(module, nn.modules.batchnorm._NormBase) else module._buffers
            for key, buffer in buffers.items():
                if buffer is not None and buffer.layout == torch.strided:
                    found[".".join(filter(None, [name, prefix, key]))] = buffer.clone()
            for key, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in trained and parameter.layout == torch.strided:
                    found[".".join(filter(None, [name, prefix, key]))] = _some_of(local(parameter.detach()))
    for change in trainer.python_state.changes()[0]:
        if change.path[0].startswith("networks["):
            found[change.name] = [change.value, {name: t.detach().clone() for name, t in change.tensors.items()}]
    return found


def _some_of(tensor: Tensor) -> Tensor:
    """A copy of some numbers of a tensor: a copy of a large model's weights might not fit in memory."""
    return tensor.reshape(-1)[:: max(1, tensor.numel() // MOST_NUMBERS)].clone()


def _same(one: Any, other: Any) -> bool:
    """Whether two kept values are equal: tensors, or JSON and tensors by name."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and same(one, other)
    if isinstance(one, list) and isinstance(other, list):
        return (
            one[0] == other[0]
            and one[1].keys() == other[1].keys()
            and all(_same(one[1][name], tensor) for name, tensor in other[1].items())
        )
    return False
