"""What is done where memory is short: all processes take their share of the batch in smaller micro-batches."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import nn

from .blocks import is_split
from .data import Feed, GlobalBatch
from .errors import ShortOfMemory, TrainingError, UserError
from .runtime import Runtime, give_back_memory
from .step import EagerStep, Losses


class MicroBatches:
    """In how many micro-batches the processes take a batch: as many as were asked for, or more, for want of memory.

    The batch stays, and with it the result up to rounding; BatchNorm's statistics and dropout's masks are other ones.

    One process finds out by a step that fails: it is undone and taken again. Of several, the one that fails would
    leave the others waiting in the middle of theirs; so they try before the first step, each by itself, and agree. What
    one of them lacks later ends the run with a line that says how it goes on.
    """

    def __init__(self, engine: EagerStep, feed: Feed, runtime: Runtime):
        self.engine, self.feed, self.runtime = engine, feed, runtime
        self.asked = feed.accumulate
        # with several processes its statistics are those of all
        feed.least = 2 if self.has_batch_norm and runtime.world_size == 1 else 1

    @property
    def has_batch_norm(self) -> bool:
        """Whether a network has a BatchNorm, which needs two examples."""
        modules = (module for network in self.engine.networks.values() for module in network.modules())
        return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules)

    def prepare(self) -> None:
        """Gets ready for the first step. Raises UserError where the memory does not do for a single example."""
        while not self.fit():
            if self.feed.largest_micro_batch <= self.feed.least:
                raise UserError(
                    "out of memory with a single example on each process; use a smaller network, or processes with "
                    "more memory"
                )
            self._split()
        self.engine.rehearse(self.feed.rehearsal)

    def fit(self) -> bool:
        """Whether all of several processes have the memory for a micro-batch; one process finds out by its steps.

        So do those that hold parts of the networks, which none of them can run by itself.
        """
        if self.runtime.world_size == 1 or any(map(is_split, self.engine.networks.values())):
            return True
        fits = self.engine.fits(self.feed.rehearsal)
        return not self.runtime.max([float(not fits)])[0]

    def take(self, batch: GlobalBatch) -> Losses | None:
        """The batch's steps; None where it is to be taken again, in the smaller micro-batches that the feed now gives.

        Raises TrainingError where that can't be.
        """
        try:
            return self.engine(batch)
        except ShortOfMemory as short:
            if self.runtime.world_size > 1 or batch.steps > 1 or self.feed.largest_micro_batch <= self.feed.least:
                rank, remedy = self.runtime.rank, self._remedy()
                raise TrainingError(f"process {rank}: out of memory in a step ({short}); {remedy}") from short
            updated = short.updated
        # only here are the error and its frames gone, which hold the memory
        self._split()
        self.engine.rehearse(self.feed.rehearsal)
        self.engine.updated = updated
        self.engine.say(f"memory   {self.note()}")
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
            self.engine.rehearse(self.feed.rehearsal)

    def _split(self) -> None:
        self.feed.accumulate *= 2
        free(self.engine)

    def _remedy(self) -> str:
        if self.feed.largest_micro_batch <= self.feed.least:
            return "a micro-batch is a single example already; use a smaller network, or a device with more memory"
        return f"the same command with --accumulate {2 * self.feed.accumulate} goes on from the last checkpoint"


def free(engine: EagerStep) -> None:
    """Gives back the memory that is kept for speed only."""
    engine.free()
    gc.collect()  # an error's frames may hold each other
    give_back_memory()
    if engine.runtime.device.type == "cuda":
        torch.cuda.empty_cache()
