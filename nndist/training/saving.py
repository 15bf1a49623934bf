"""When a run's checkpoints are written, which are kept, and waiting for them before the run ends."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from ..config import Interval, RunConfig
from ..errors import TrainingError
from ..files import remove_folder
from ..runs import checkpoint, checkpoint_writer
from ..runs.network_state import own_tensors
from . import snapshot

if TYPE_CHECKING:
    from .trainer import Trainer


class Saving:
    """Publishes checkpoints of a trainer in the background, one at a time.

    steps: those of the run's checkpoints that still exist, oldest first. The newest `--keep` and the best are kept.
    """

    def __init__(self, trainer: Trainer, config: RunConfig, steps_per_epoch: int) -> None:
        self.trainer, self.keep = trainer, config.keep
        every = Interval.parse(config.save_every, "--save-every")
        self._every_steps = every.in_steps(steps_per_epoch)
        self._every_minutes = every.every if self._every_steps is None else None
        self.steps: list[int] = []
        self.longest = 0.0  # seconds from a snapshot to its publication
        self._writer = checkpoint_writer.Writer()
        self._pending = 0  # the step of the checkpoint that is being written
        self._unremoved: list[int] = []  # on Windows: files of theirs were open
        self.start_clock()

    def start_clock(self) -> None:
        """Restarts the clock of `--save-every '10 minutes'`."""
        self._last = time.perf_counter()

    def is_due_at(self, step: int) -> bool:
        """Whether `--save-every` is in steps or epochs and names this one."""
        return bool(self._every_steps) and step % self._every_steps == 0  # type: ignore[operator]

    def is_due_by_time(self) -> bool:
        """Whether `--save-every` is in minutes and they have passed, by this process's clock."""
        return self._every_minutes is not None and time.perf_counter() - self._last >= 60 * self._every_minutes

    def save(self) -> None:
        """Publishes a checkpoint of the current state; a collective.

        Training waits for an earlier one, and for a copy of the state. Raises TrainingError on all processes if the
        earlier one could not be written, or if a loss since the last record is not finite: such a state is never saved.
        """
        trainer = self.trainer
        if trainer.step in self.steps:
            return
        if trainer.window.examples:
            trainer.window.reduce(trainer.step, trainer.total_steps)
        self.wait()
        self.steps.append(trainer.step)
        best = trainer.best.record["step"] if trainer.best.record else None
        kept = {*self.steps[-self.keep :], best}
        removed = [step for step in self.steps if step not in kept]
        self.steps = [step for step in self.steps if step in kept]
        trainer.timing.enter("saving")
        began = time.perf_counter()
        taken = snapshot.take(trainer)
        self.start_clock()
        if taken is None:
            trainer.timing.enter("other")
            return
        root = trainer.folder / "checkpoints"

        def remove_old() -> None:
            self.longest = max(self.longest, time.perf_counter() - began)
            steps = [*self._unremoved, *removed]
            self._unremoved = [step for step in steps if not remove_folder(root / checkpoint.folder_name(step))]

        self._pending = trainer.step
        trainer.sharding.publish(root, taken, self._writer, then=remove_old)
        trainer.timing.enter("other")

    def wait(self) -> None:
        """Waits until the pending checkpoint is on disk; raises TrainingError on all processes if that fails."""
        reason = ""
        try:
            self._writer.wait()
        except Exception as error:
            reason = self._unwritten(error)
        reason = self.trainer.runtime.from_main(reason)
        if reason:
            raise TrainingError(reason)

    def let_writer_finish(self) -> None:
        """Waits for a pending checkpoint when the run ends on an error, so that it can be resumed from."""
        with contextlib.suppress(Exception):
            self._writer.wait()

    def _unwritten(self, error: Exception) -> str:
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        return (
            f"step {self._pending}: checkpoint in {self.trainer.folder} could not be written ({why}); earlier ones "
            "are kept"
        )


def state_bytes(trainer: Trainer) -> int:
    """Estimated size of a checkpoint: the weights, their EMA, and two optimizer tensors for each."""
    tensors = (t for network in trainer.networks.values() for t in own_tensors(network).values())
    weights = sum(t.numel() * t.element_size() for t in tensors)
    return 4 * weights + 2**20
