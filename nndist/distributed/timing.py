"""Where the time of a step goes, on each process: data, passes, waiting for the others, update."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

STEP_PHASES = ("data", "passes", "sum", "update")
"""data: fetching, preparing and augmenting the batch. passes: forward and backward. sum: the all-reduce of the
gradients, which waits for the slowest process. update: clipping, optimizer and bookkeeping."""
PHASES = (*STEP_PHASES, "evaluation", "saving", "other")
APART = ("evaluation", "saving")
"""Phases that do not count as an epoch's training."""
DOING = {
    "data": "loading data",
    "passes": "the forward or backward pass",
    "sum": "the sum of the gradients",
    "update": "the update",
    "evaluation": "an evaluation",
    "saving": "saving a checkpoint",
    "other": "the recipe's own code or the loop",
}
"""What a process is doing in a phase, for a person."""
MOST_EVENTS = 4096  # that wait on a GPU to be read

T = TypeVar("T")


class Timing:
    """Seconds of this process by phase, from `enter` to the next `enter`.

    On a CUDA device they are the device's, measured by events in its stream: the host runs ahead of it, so a phase is
    long only if the device had to wait for it. With DDP and FSDP the gradients are summed within the passes.

    phase, step: what is being done; other threads may read them.
    """

    def __init__(self, device: torch.device, new_event: Callable[[], Any] | None = None):
        self.phase, self.step = "other", 0
        self.since = time.perf_counter()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.steps = 0  # since the last `take`
        self.epochs: list[float] = []  # seconds of each whole epoch since the last `take_epochs`
        self._epoch_began: float | None = None
        self._apart = 0.0  # seconds of evaluations and checkpoints since then
        self._new_event = new_event
        if device.type == "cuda" and new_event is None:
            self._new_event = lambda: torch.cuda.Event(enable_timing=True)
        self._events: list[tuple[str, Any]] = []  # the phase that begins with each

    def enter(self, phase: str) -> None:
        """Begins a phase."""
        now = time.perf_counter()
        if self.phase in APART:
            self._apart += now - self.since
        if self._new_event is None:
            self.seconds[self.phase] += now - self.since
        else:
            self._mark(phase)
        self.phase, self.since = phase, now

    def fetched(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches; the time that each takes to come counts as data."""
        while True:
            self.enter("data")
            batch = next(batches, None)
            if batch is None:
                self.enter("other")
                return
            yield batch

    def stepped(self) -> None:
        """Ends a step."""
        self.step += 1
        self.steps += 1
        self.enter("other")

    def begin_epoch(self) -> None:
        """Begins to time an epoch, of which no step has been taken."""
        self._epoch_began, self._apart = time.perf_counter(), 0.0

    def end_epoch(self) -> None:
        """Ends an epoch and begins the next; one that began before this launch is not timed."""
        if self._epoch_began is not None:
            self.epochs.append(time.perf_counter() - self._epoch_began - self._apart)
        self.begin_epoch()

    def take_epochs(self) -> dict[str, float]:
        """The mean seconds of the epochs that ended since the last call, as a metric; {} if none did."""
        epochs, self.epochs = self.epochs, []
        return {"seconds_per_epoch": round(sum(epochs) / len(epochs), 4)} if epochs else {}

    def take(self) -> tuple[int, dict[str, float]]:
        """The steps since the last call, and the seconds of each phase. On a GPU it waits for the last event."""
        self.enter(self.phase)
        self._read_events()
        steps, seconds = self.steps, self.seconds
        self.steps, self.seconds = 0, dict.fromkeys(PHASES, 0.0)
        return steps, seconds

    def _mark(self, phase: str) -> None:
        assert self._new_event is not None
        event = self._new_event()
        event.record()
        self._events.append((phase, event))
        if len(self._events) > MOST_EVENTS:
            self._read_events()

    def _read_events(self) -> None:
        if len(self._events) < 2:
            return
        self._events[-1][1].synchronize()
        for (phase, begin), (_, end) in zip(self._events, self._events[1:], strict=False):
            self.seconds[phase] += begin.elapsed_time(end) / 1000
        del self._events[:-1]


class Pace:
    """What all processes' timings say together.

    steps: of this launch. seconds: of each process by rank and step phase, in all. slowest: in how many of the records
    it was the slowest, by rank: the others waited for it.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device, all_reduce_sum: Callable[[Tensor], Tensor]):
        self.rank, self.world_size, self.device, self.all_reduce_sum = rank, world_size, device, all_reduce_sum
        self.steps = 0
        self.seconds = [dict.fromkeys(STEP_PHASES, 0.0) for _ in range(world_size)]
        self.slowest = [0] * world_size

    def record(self, timing: Timing) -> dict[str, float]:
        """Seconds per step since the last call, by metric; {} if there was no step. A collective.

        seconds/data, ... are means over the processes; seconds/slowest is that of the process which kept the others
        waiting, without its own waiting.
        """
        steps, own = timing.take()
        if not steps:
            return {}
        rows = self._of_all([own[phase] for phase in STEP_PHASES])
        self.steps += steps
        for total, row in zip(self.seconds, rows, strict=True):
            for phase, value in zip(STEP_PHASES, row, strict=True):
                total[phase] += value
        means = [sum(row[place] for row in rows) / self.world_size / steps for place in range(len(STEP_PHASES))]
        metrics = {f"seconds/{phase}": round(mean, 7) for phase, mean in zip(STEP_PHASES, means, strict=True)}
        if self.world_size > 1:
            busy = [sum(row) - row[STEP_PHASES.index("sum")] for row in rows]
            self.slowest[busy.index(max(busy))] += 1
            metrics["seconds/slowest"] = round(max(busy) / steps, 7)
        return metrics

    def _of_all(self, seconds: list[float]) -> list[list[float]]:
        """The seconds of every process, by rank."""
        if self.world_size == 1:
            return [seconds]
        table = torch.zeros(self.world_size, len(seconds), dtype=torch.float64, device=self.device)
        table[self.rank] = torch.tensor(seconds, dtype=torch.float64)
        return self.all_reduce_sum(table).tolist()

    def summary(self, hosts: list[str]) -> list[dict[str, Any]]:
        """A row for each process, by rank: its host, and seconds per step by phase in this launch."""
        steps = max(1, self.steps)
        return [
            {"host": host, "seconds_per_step": {p: round(s / steps, 7) for p, s in total.items()}, "slowest_in": often}
            for host, total, often in zip(hosts, self.seconds, self.slowest, strict=True)
        ]
