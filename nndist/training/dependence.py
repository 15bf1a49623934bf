"""Notes on what makes results depend on how batches are split: in-batch negatives, state kept between micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.feed import GlobalBatch, MicroBatch
from ..metrics import Weighted, per_example
from ..runs.optimizer_state import repeatable
from ..runs.python_undo import CanNotBeUndone, Remembered, same
from .evaluation import evaluating

if TYPE_CHECKING:
    from .trainer import Trainer

EXAMPLES = 8
BEYOND_ROUNDING = 1e-2
"""Relative to the largest of the losses: kernels round differently for batches of different sizes."""
MOST_BYTES = 1 << 30
"""Of the tensors that are copied for the passes to leave no trace; above it nothing is said."""


def note_on_dependence(trainer: Trainer) -> str:
    """The note for losses that depend on the other examples of a batch if batches are split; "" if none seems to.

    The first examples' loss is computed together, and that of the first alone, in evaluation mode and without a trace.
    The same on all processes, since a loss may sum over them.
    """
    is_split = trainer.runtime.world_size > 1 or trainer.feed.accumulate > 1
    if not is_split or trainer.sharding.is_sharded or min(trainer.feed.batch_size, len(trainer.feed.examples)) < 2:
        return ""
    if any(type(m).__name__ == "OptimizedModule" for n in trainer.networks.values() for m in n.modules()):
        return ""  # it would be compiled again for each size
    names: list[str] = []
    # what can't be computed alone or in evaluation mode is no reason to stop: nothing is said then
    with contextlib.suppress(Exception), _without_trace(trainer), evaluating(trainer.networks):
        step = trainer.optimizer_step
        numbers = torch.arange(min(EXAMPLES, trainer.feed.batch_size, len(trainer.feed.examples)))
        parts = [numbers, numbers, numbers[:1]]
        batches = []
        for raw, part in zip(trainer.feed.examples.in_epoch(trainer.config.seed, 0).batches(parts), parts, strict=True):
            micro = MicroBatch(raw, len(part), part)
            batches.append(step.inputs(GlobalBatch(0, 0, len(part), (micro,)), micro))
        for name, objective in step.objectives.items():
            together, again, alone = (_losses(objective, trainer.networks, inputs) for inputs in batches)
            scale = BEYOND_ROUNDING * torch.cat([together, alone]).abs().amax(0)
            is_random = bool(((together - again).abs() > 0.01 * scale).any())
            # the closest of them, as collate may have sorted the batch
            if not is_random and bool(((together - alone).abs() > scale).any(1).all()):
                names.append(name)
    if not names:
        return ""
    which = "" if names == ["model"] else f" (objective {', '.join(map(repr, names))})"
    return (
        f"an example's loss depends on the others in its batch{which}, such as through in-batch negatives or padding, "
        "and it sees those of its micro-batch only: results depend on --accumulate and the number of processes"
    )


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


def _losses(objective: Callable[..., Any], networks: Any, inputs: Any) -> Tensor:
    """Loss of each example, and its weight if it has one: float64 [k, 1 or 2], on the CPU."""
    given = per_example(objective(networks, inputs))
    columns = list(given) if isinstance(given, Weighted) else [given]
    return torch.stack([column.detach().double().cpu() for column in columns], 1)


@contextlib.contextmanager
def _without_trace(trainer: Trainer) -> Iterator[None]:
    """Context manager: random state, buffers and Python objects have the values of before afterwards.

    Raises CanNotBeUndone for what can't be put back.
    """
    python = Remembered(trainer.python_state, most_bytes=MOST_BYTES)
    if python.has_counters():
        raise CanNotBeUndone("itertools.count")
    put_back = repeatable(trainer.networks, trainer.runtime.device)
    try:
        yield
    finally:
        python.put_back()
        put_back()
