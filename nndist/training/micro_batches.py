"""Out-of-memory retries: all processes take their share of the batch in smaller micro-batches."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .. import machine
from ..data.feed import Feed
from ..distributed.runtime import Runtime
from ..errors import ShortOfMemory, TrainingError
from ..runs.random_state import repeatable
from .networks import first_with_hook, has_batch_norm
from .step import Step

MOST_UNDONE = 2
"""How many steps of a launch can be retried. After the first the memory of a step is known, after the second also with
the optimizer's state; copying the random state and running statistics before every step would take time."""


class MicroBatches:
    """How many micro-batches each process splits its share into: as many as requested, or more if memory is short.

    The global batch stays, and so the result up to rounding; BatchNorm's statistics and dropout's masks differ.

    If one of the first steps runs out of memory, all processes undo and retry it, if they can tell each other. What the
    recipe has changed in Python objects by then stays changed. Later, running out of memory ends the run with a line
    that says how to resume it.
    """

    def __init__(self, step: Step, feed: Feed, runtime: Runtime, say: Callable[[str], None] = lambda line: None):
        self.step, self.feed, self.runtime, self.say = step, feed, runtime, say
        self.asked = feed.accumulate
        self.is_short = False
        self._undo: Callable[[], None] | None = None
        self._taken = 0  # steps since the micro-batches last changed their size
        # across several processes BatchNorm's statistics are global: one example each is enough
        self.has_batch_norm = has_batch_norm(step.networks)
        feed.least = 2 if self.has_batch_norm and runtime.world_size == 1 else 1

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Context manager around a step: sets `is_short` if it ran out of memory and `retry_smaller` can undo it.

        Raises TrainingError if it can't be undone.
        """
        self.is_short, self._undo = False, None
        if self._taken < MOST_UNDONE:
            self._undo = repeatable(self.step.networks, self.runtime.device)
        try:
            yield
            self._taken += 1
        except ShortOfMemory as short:
            smallest = self.feed.largest_micro_batch <= self.feed.least
            if self._undo is None or short.final or smallest or first_with_hook(self.step.networks):
                line = f"process {short.rank}: out of memory in a step ({short}); {self._remedy()}"
                raise TrainingError(line) from short
            self.is_short = True

    def retry_smaller(self) -> None:
        """Undoes the step; the feed delivers its batch again in smaller micro-batches."""
        assert self._undo is not None
        self._undo()
        self.step.buffer_sync.begin()
        self.feed.accumulate *= 2
        self._taken = 0
        free(self.step)
        self.say(f"memory   {self.note()}")

    def note(self) -> str:
        """A line for the plan if the number of micro-batches is not the requested one, else ""."""
        used = self.feed.accumulate
        if used == self.asked:
            return ""
        examples = -(-self.feed.batch_size // used)
        return (
            f"short: {used} micro-batches, not {self.asked}; the batch stays {self.feed.batch_size}"
            + f", BatchNorm sees {examples}" * self.has_batch_norm
        )

    def state(self) -> dict[str, int]:
        """The state for a checkpoint."""
        return {"asked": self.asked, "used": self.feed.accumulate}

    def restore(self, saved: dict[str, Any], world_size: int) -> None:
        """Restores the number that an earlier launch with the same request came to, so that results match bit for bit.

        world_size: that launch's.
        """
        same = saved.get("asked") == self.asked and world_size == self.runtime.world_size
        if same and saved["used"] > self.feed.accumulate:
            self.feed.accumulate = saved["used"]

    def _remedy(self) -> str:
        size = self.feed.largest_micro_batch
        if size <= self.feed.least:
            examples = "a single example" if size == 1 else f"{size} examples, which BatchNorm needs"
            return f"a micro-batch is only {examples}; use a smaller network, or a device with more memory"
        if hooked := first_with_hook(self.step.networks):
            return (
                f"{hooked} has a gradient hook, which would see each micro-batch's own gradient; change the gradient "
                "in before_update() instead, or use a smaller --batch-size"
            )
        return f"the same command with --accumulate {2 * self.feed.accumulate} resumes from the last checkpoint"


def free(step: Step) -> None:
    """Frees memory that is held for speed only."""
    step.free()
    gc.collect()  # an error's frames may form cycles
    machine.give_back_memory()
    if step.runtime.device.type != "cpu":
        torch.accelerator.empty_cache()
