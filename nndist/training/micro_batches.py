"""What is done where memory is short: all processes take their share of the batch in smaller micro-batches."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..data.feed import Feed, GlobalBatch
from ..distributed.runtime import Runtime, give_back_memory
from ..errors import ShortOfMemory, TrainingError
from ..runs.optimizer_state import repeatable
from .step import Losses, Step

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

    def __init__(self, engine: Step, feed: Feed, runtime: Runtime, say: Callable[[str], None] = lambda line: None):
        self.engine, self.feed, self.runtime, self.say = engine, feed, runtime, say
        self.asked = feed.accumulate
        self._taken = 0  # steps since the micro-batches have the size that they have
        # with several processes its statistics are those of all
        feed.least = 2 if self.has_batch_norm and runtime.world_size == 1 else 1

    @property
    def has_batch_norm(self) -> bool:
        """Whether a network has a BatchNorm, which needs two examples."""
        modules = (module for network in self.engine.networks.values() for module in network.modules())
        return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules)

    def take(self, batch: GlobalBatch, due: Any = None) -> Losses | None:
        """The batch's step; None where it is to be taken again, in the smaller micro-batches that the feed now gives.

        Raises TrainingError where that can't be.
        """
        undo = None
        if self._taken < MOST_UNDONE:
            undo = repeatable(self.engine.networks, self.runtime.device)
        try:
            losses = self.engine(batch, due)
            self._taken += 1
            return losses
        except ShortOfMemory as short:
            if undo is None or short.final or self.feed.largest_micro_batch <= self.feed.least:
                line = f"process {short.rank}: out of memory in a step ({short}); {self._remedy()}"
                raise TrainingError(line) from short
        # only here are the error and its frames gone, which hold the memory
        undo()
        self.engine.buffer_sync.begin()
        self._split()
        self.say(f"memory   {self.note()}")
        return None

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

    def _split(self) -> None:
        self.feed.accumulate *= 2
        self._taken = 0
        free(self.engine)

    def _remedy(self) -> str:
        if self.feed.largest_micro_batch <= self.feed.least:
            return "a micro-batch is a single example already; use a smaller network, or a device with more memory"
        return f"the same command with --accumulate {2 * self.feed.accumulate} resumes from the last checkpoint"


def free(engine: Step) -> None:
    """Gives back the memory that is kept for speed only."""
    engine.free()
    gc.collect()  # an error's frames may hold each other
    give_back_memory()
    if engine.runtime.device.type == "cuda":
        torch.cuda.empty_cache()
