"""Notes what a network keeps from one micro-batch to the next, so that results depend on how batches are split."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..runs.python_undo import same

if TYPE_CHECKING:
    from .trainer import Trainer


@contextlib.contextmanager
def noting_what_is_carried(trainer: Trainer) -> Iterator[None]:
    """Context manager around the first step: notes what a network carries from one micro-batch to the next.

    Such as a hidden state kept by row, or a codebook that each forward pass updates; but for running statistics of
    normalisation layers.
    """
    if trainer.feed.accumulate == 1:
        yield
        return
    objectives = trainer.optimizer_step.objectives
    originals, carried = dict(objectives), dict[str, None]()

    def noting(objective: Callable[..., Any]) -> Callable[..., Any]:
        before: dict[str, Any] = {}

        def call(*arguments: Any) -> Any:
            given = objective(*arguments)
            now = _kept_in(trainer)
            if before:  # what the first micro-batch makes, such as a table, the next one may only read
                carried.update(dict.fromkeys(name for name in now if not _same(before["values"].get(name), now[name])))
            before["values"] = now
            return given

        return call

    objectives.update({name: noting(objective) for name, objective in originals.items()})
    try:
        yield
    finally:
        objectives.update(originals)
    if carried:
        names = list(carried)
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        trainer.tracker.say(
            f"note     {shown}: changed by the forward pass of each micro-batch, and a step has "
            f"{trainer.feed.accumulate} of them, each of other examples: results may depend on --accumulate"
        )


def _kept_in(trainer: Trainer) -> dict[str, Any]:
    """What the networks keep by name: their buffers, except of normalisation, and changed Python values."""
    found: dict[str, Any] = {
        ".".join(filter(None, [name, prefix, key])): buffer.clone()
        for name, network in trainer.networks.items()
        for prefix, module in network.named_modules()
        if not isinstance(module, nn.modules.batchnorm._NormBase)
        for key, buffer in module._buffers.items()
        if buffer is not None and buffer.layout == torch.strided
    }
    for change in trainer.python_state.changes()[0]:
        if change.path[0].startswith("networks["):
            found[change.name] = [change.value, {name: t.detach().clone() for name, t in change.tensors.items()}]
    return found


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
