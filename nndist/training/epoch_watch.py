"""What must stay within an epoch: the order of a set of the user's own, and what worker processes have of a set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..data.sets import reads_in_workers
from ..errors import UserError
from ..runs.python_marks import PlacePath
from ..runs.python_state import readable

if TYPE_CHECKING:
    from .trainer import Trainer


class EpochWatch:
    """Compares a training set with what it was when the epoch began, also if that was before a resume.

    order: a checksum of the epoch's order, if it is of the user's own; a checkpoint has it.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.order: int | None = None
        self._marks: dict[PlacePath, Any] = {}

    def begin(self) -> None:
        """Called where an epoch's batches are read from; raises UserError for another order than before."""
        self._check_order()
        trainer = self.trainer
        if reads_in_workers(trainer.data.train):  # they have it as it is now
            self._marks = trainer.python_state.marks_of("data.train", trainer.data.train)

    def changed(self) -> list[str]:
        """The names of what hooks have changed since then in a set that worker processes read."""
        trainer = self.trainer
        if not self._marks or not trainer.batch:
            return []
        now = trainer.python_state.marks_of("data.train", trainer.data.train)
        return [readable(path) for path, mark in self._marks.items() if path in now and now[path] != mark]

    def _check_order(self) -> None:
        trainer = self.trainer
        own = trainer.feed.order_checksum(trainer.epoch)
        if own is None:
            return
        if any(other != own for other in trainer.runtime.gather_objects(own)):
            raise UserError(
                f"order() of the training set differs between processes in epoch {trainer.epoch + 1}; it must be a "
                "function of the seed, the epoch and what all processes know"
            )
        if trainer.batch and self.order not in (None, own):
            raise UserError(
                f"order() of the training set has changed within epoch {trainer.epoch + 1}, so its rest can't be "
                "trained on; let it depend on the seed, the epoch and what changes in after_epoch() only"
            )
        self.order = own
