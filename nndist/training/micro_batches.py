"""What is done where memory is short: all processes take their share of the batch in smaller micro-batches."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..data.feed import Feed
from ..distributed.runtime import Runtime, give_back_memory
from ..errors import ShortOfMemory, TrainingError
from ..runs.optimizer_state import repeatable
from .networks import has_batch_norm
from .step import Step

MOST_UNDONE = 2
"""Steps of a launch that can be taken again. What one needs is known after the first, and after the second beside what
the optimizer has come to keep; to copy random numbers and running statistics before each step would take time."""


class MicroBatches:
    """In how many micro-batches the processes take a batch: as many as were asked for, or more, for want of memory.

    The batch stays, and with it the result up to rounding; BatchNorm's statistics and dropout's masks are other ones.

    A step that fails at the beginning is undone and taken again, by all processes, where they can tell each other. What
    the recipe has changed in Python's own objects until then stays changed. Later a lack of memory ends the run with a
    line that says how it is resumed.
    """

    def __init__(self, step: Step, feed: Feed, runtime: Runtime, say: Callable[[str], None] = lambda line: None):
        self.step, self.feed, self.runtime, self.say = step, feed, runtime, say
        self.asked = feed.accumulate
        self.is_short = False
        self._undo: Callable[[], None] | None = None
        self._taken = 0  # steps since the micro-batches have the size that they have
        # with several processes its statistics are those of all
        self.has_batch_norm = has_batch_norm(step.networks)
        feed.least = 2 if self.has_batch_norm and runtime.world_size == 1 else 1

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Around a step: sets `is_short` where memory was short for it and `retry_smaller` can undo it.

        Raises TrainingError where it can't be undone.
        """
        self.is_short, self._undo = False, None
        if self._taken < MOST_UNDONE:
            self._undo = repeatable(self.step.networks, self.runtime.device)
        try:
            yield
            self._taken += 1
        except ShortOfMemory as short:
            if self._undo is None or short.final or self.feed.largest_micro_batch <= self.feed.least:
                line = f"process {short.rank}: out of memory in a step ({short}); {self._remedy()}"
                raise TrainingError(line) from short
            self.is_short = True

    def retry_smaller(self) -> None:
        """Undoes the step, and has the feed give its batch again in smaller micro-batches."""
        assert self._undo is not None
        self._undo()
        self.step.buffer_sync.begin()
        self.feed.accumulate *= 2
        self._taken = 0
        free(self.step)
        self.say(f"memory   {self.note()}")

    def note(self) -> str:
        """What differs from what was asked for, in a line for the plan, or ""."""
        used = self.feed.accumulate
        if used == self.asked:
            return ""
        examples = -(-self.feed.batch_size // used)
        return (
            f"short: {used} micro-batches, not {self.asked}; the batch stays {self.feed.batch_size}"
            + f", BatchNorm sees {examples}" * self.has_batch_norm
        )

    def state(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"asked": self.asked, "used": self.feed.accumulate}

    def restore(self, saved: dict[str, Any], world_size: int) -> None:
        """Takes up the number of an earlier launch that asked for the same, so that its bits are met again.

        world_size: that launch's.
        """
        same = saved.get("asked") == self.asked and world_size == self.runtime.world_size
        if same and saved["used"] > self.feed.accumulate:
            self.feed.accumulate = saved["used"]

    def _remedy(self) -> str:
        if self.feed.largest_micro_batch <= self.feed.least:
            return "a micro-batch is a single example already; use a smaller network, or a device with more memory"
        return f"the same command with --accumulate {2 * self.feed.accumulate} resumes from the last checkpoint"


def free(step: Step) -> None:
    """Gives back the memory that is kept for speed only."""
    step.free()
    gc.collect()  # an error's frames may hold each other
    give_back_memory()
    if step.runtime.device.type == "cuda":
        torch.cuda.empty_cache()
