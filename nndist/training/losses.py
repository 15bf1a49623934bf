"""The losses of the steps since the last record: kept on the device, and summed exactly for the next one."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.feed import Feed, GlobalBatch
from ..data.sets import keeps_order
from ..distributed.runtime import Runtime
from ..errors import NotFiniteLoss
from ..metrics import Means, Weighted
from .step import Losses


class _Taken(NamedTuple):
    """A step whose losses are not in the means yet: its batch and losses."""

    epoch: int
    batch: int
    losses: Losses


class LossWindow:
    """Losses and gradient norms of the steps since the last record. Nothing waits for the device until `reduce`.

    objectives: all their names, in order. means: this process's sums and counts so far. examples: those of these steps,
    over all processes. counted: how many of them each objective has seen.
    """

    def __init__(self, objectives: Collection[str], feed: Feed, runtime: Runtime) -> None:
        self.objectives, self.feed, self.runtime = objectives, feed, runtime
        self._pending: list[_Taken] = []
        self.begin()

    def begin(self) -> None:
        """Empties the window."""
        self.means = Means()
        self.examples = 0
        self.counted: Counter[str] = Counter()
        self.start_clock()

    def start_clock(self) -> None:
        """Restarts the measurement of `examples_per_second`: evaluating and compiling are not training."""
        self._since, self._timed = time.perf_counter(), 0  # _timed: examples since then

    def add(self, batch: GlobalBatch, losses: Losses, norms: Mapping[str, Tensor]) -> None:
        """Adds a step's losses, and its gradients' norms if they were clipped."""
        self._pending.append(_Taken(batch.epoch, batch.index, losses))
        for name, norm in norms.items():
            finite = norm.isfinite()  # the scaler of fp16 skips a step whose gradient overflows
            self.means.add(f"gradient_norm/{name}", Weighted(norm.where(finite, 0.0), finite))
        self.examples += batch.size
        self._timed += batch.size
        self.counted.update(dict.fromkeys(losses, batch.size))

    def reduce(self, step: int, total_steps: int) -> dict[str, tuple[float, int]]:
        """Mean and count of each objective and norm over all processes; `step` is the last one added.

        Raises NotFiniteLoss, which names the step and the examples, if a loss is not finite.
        """
        for name in self.objectives:
            for *_, losses in self._pending:
                for loss in losses.get(name, ()):
                    self.means.add(name, loss)
        reduced = self.means.reduce(self.runtime.sum, self.runtime.device)
        means = [reduced[name] for name in self.objectives if name in reduced]
        if not all(math.isfinite(mean) or not count for mean, count in means):
            self._check_finite(step, total_steps)
        self._pending.clear()
        return reduced

    def record(self, step: int, total_steps: int) -> dict[str, float]:
        """Exact mean losses and norms by their names in records; raises NotFiniteLoss as `reduce` does."""
        reduced = self.reduce(step, total_steps)
        named = {}
        for name in self.objectives:
            mean, count = reduced.pop(name, (math.nan, 0))
            assert count == self.counted[name], f"{count} losses of {name!r} for {self.counted[name]} examples"
            if count:  # it was due in one of the steps
                named["train/loss" if name == "model" else f"train/loss/{name}"] = mean
        return named | {name.removesuffix("/model"): mean for name, (mean, _) in reduced.items()}

    @property
    def examples_per_second(self) -> float | None:
        """Training throughput over all processes, without evaluations and the compiled first step; None if no other."""
        return self._timed / max(1e-9, time.perf_counter() - self._since) if self._timed else None

    def restore(self, means: Means, examples: int, counted: Mapping[str, int]) -> None:
        """Restores the window of a checkpoint."""
        self.means, self.examples, self.counted = means, examples, Counter(counted)

    def _check_finite(self, step: int, total_steps: int) -> None:
        """Raises NotFiniteLoss for the first step with a loss that is not finite, naming its examples."""
        own: list[Any] = [None, []]
        for number, (epoch, batch, losses) in enumerate(self._pending, step - len(self._pending) + 1):
            if not losses:  # no objective was due
                continue
            values = [
                torch.cat([x.values if isinstance(x, Weighted) else x for x in parts]) for parts in losses.values()
            ]
            bad = (~torch.isfinite(torch.stack(values)).all(0)).nonzero().flatten().cpu()
            if len(bad):
                own = [number, self._named(epoch, batch, bad)]
                break
        everywhere = [one for one in self.runtime.gather_objects(own) if one[0] is not None]
        if not everywhere:
            return  # every loss is finite but all weights are 0: their mean is undefined
        first = min(number for number, _ in everywhere)
        at_first = [numbers for number, numbers in everywhere if number == first]
        if not all(at_first):
            raise NotFiniteLoss(
                f"the loss is not finite at step {first} of {total_steps}; try a lower --lr, or --clip-norm 1, or "
                "check the training examples (which it was can't be told, as collate changes their order in a batch)",
                first,
            )
        examples = sorted(e for numbers in at_first for e in numbers)
        shown = ", ".join(map(str, examples[:8])) + (f" and {len(examples) - 8} more" if len(examples) > 8 else "")
        raise NotFiniteLoss(
            f"the loss is not finite at step {first} of {total_steps}, training example{'s' * (len(examples) > 1)} "
            f"{shown}; try a lower --lr, or --clip-norm 1, or check those examples",
            first,
        )

    def _named(self, epoch: int, batch: int, places: Tensor) -> list[int]:
        """The numbers of this process's examples at these places of a batch; [] if `collate` may have moved them."""
        numbers = self.feed.local_numbers(epoch, batch)
        if not keeps_order(self.feed.examples.in_epoch(self.feed.seed, epoch), numbers):
            return []
        return self.feed.examples.named(numbers[places]).tolist()
