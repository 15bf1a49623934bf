"""Notes losses of cross-entropy whose mean is not torch's, as they come without the weights that torch divides by."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..recipe.classifier import Classifier
from ..torch_internals import Unaveraged, unaveraged_cross_entropies

if TYPE_CHECKING:
    from .trainer import Trainer


@contextlib.contextmanager
def noting_plain_losses(trainer: Trainer) -> Iterator[None]:
    """Context manager around the first step: notes losses with weights or ignored targets that are not `Weighted`.

    The loop's mean of plain losses is over all of them; torch's cross_entropy divides by the sum of the weights of the
    targets that are not ignored. One note, of the first objective that has such losses.
    """
    found: dict[str, Unaveraged] = {}

    def noting(name: str, objective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            given = objective(*arguments)
            if isinstance(given, Tensor) and given.dim() and not found:
                found.update((name, one) for one in unaveraged_cross_entropies(given))
            return given

        return call

    with trainer.optimizer_step.watched(noting):
        yield
    for name, one in found.items():
        trainer.tracker.say(f"note     objective {name!r}: {_text_of(trainer, one)}")


def _text_of(trainer: Trainer, found: Unaveraged) -> str:
    """What the losses' mean is, and what makes it torch's."""
    if found.ignored is None:
        return (
            "its cross-entropy weighs classes, but the mean of the losses divides by their number; for torch's mean "
            "leave weight= out and return Weighted(losses, weight[labels])"
        )
    what = f"its cross-entropy ignores labels {found.ignored}, but the mean of the losses counts them as 0"
    remedy = f"return Weighted(losses, labels != {found.ignored})"
    if found.is_weighted:
        remedy = f"leave weight= out and return Weighted(losses, weights), the class's weight or 0 for {found.ignored}"
    elif type(trainer.recipe).loss is Classifier.loss:
        what += ", and accuracy as wrong"
        remedy = f"write ignore_index = {found.ignored} in the recipe's class"
    return f"{what}; for torch's mean {remedy}"
