"""The batch-size finder: throughput against batch size, and the largest that fits; nothing is trained or written."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator

import torch

from .. import machine
from ..config import RunConfig
from ..data.feed import Feed, GlobalBatch
from ..distributed.runtime import Runtime
from ..errors import ShortOfMemory
from ..progress import bar
from ..recipe.contract import Recipe
from ..training.description import plan
from ..training.micro_batches import free
from ..training.run import begin
from ..training.trainer import Trainer

MOST_SECONDS = 60.0
MOST_SECONDS_PER_STEP = 2.0
WARMUP_STEPS = 2  # not measured
LEAST_SECONDS = 0.4  # of measured steps, for each batch size
ENOUGH = 0.95  # of the highest throughput


@dataclasses.dataclass
class Speed:
    """Steps over batches of one size: the median time, and the peak memory of any process in bytes."""

    batch_size: int
    seconds_per_step: float
    memory: int

    @property
    def examples_per_second(self) -> float:
        """Throughput of all processes together."""
        return self.batch_size / self.seconds_per_step


def find_batch(recipe: Recipe, config: RunConfig) -> list[Speed]:
    """Measures steps over batches of 1, 2, 4, ... examples; prints the table and returns its rows.

    The smallest batch has one example per process, two if there is BatchNorm. The largest is the last before memory
    runs out or would, a step takes more than 2 s, or a minute is over; at most the training set. The learning rate is
    0, since throughput is measured, not learning. Raises UserError.
    """
    trainer = begin(recipe, config)
    runtime, most = trainer.runtime, len(trainer.data.train)
    if runtime.is_main:
        shown = plan(trainer)
        memory = "GPU memory" if runtime.device.type == "cuda" else "resident memory"
        lines = [f"{name:<8} {shown[name]}" for name in ("recipe", "data", "network", "device")]
        lines.append(f"test     throughput, not learning; the most {memory} of one process")
        lines.append(f"{'batch':>10} {'ms per step':>12} {'examples/s':>12} {'memory':>12}")
        print("\n".join(lines), flush=True)
    trainer.set_modes()
    least = max(runtime.world_size, trainer.feed.least)
    sizes = [1 << power for power in range(most.bit_length()) if least <= 1 << power]
    found: list[Speed] = []
    reason, deadline = "", time.monotonic() + MOST_SECONDS
    shown_too = config.progress and runtime.is_main and sys.stderr.isatty()  # in a log the rows are progress enough
    with bar(len(sizes), "batch sizes", shown=shown_too) as progress:
        for size in sizes:
            reason = obstacle(found, runtime, deadline)
            speed = None if reason else measured(trainer, size)
            if speed is None:
                reason = reason or f"batch {size:,} runs out of memory"
                break
            found.append(speed)
            if runtime.is_main:
                rate, peak = f"{speed.examples_per_second:>12,.0f}", f"{speed.memory / 2**20:>8,.0f} MiB"
                progress.write(f"{size:>10,} {1e3 * speed.seconds_per_step:>12.4g} {rate} {peak}")
                sys.stdout.flush()
            progress.update()
    if runtime.is_main:
        print("\n".join(conclusion(found, reason or f"the training set has {most:,} examples")), flush=True)
    return found


def obstacle(found: list[Speed], runtime: Runtime, deadline: float) -> str:
    """Why the next size is not tried, identical on all processes; "" if it is."""
    if not found:
        return ""
    before, last = found[-2:] if len(found) > 1 else found * 2
    needed = last.memory + 2 * (last.memory - before.memory)
    late, short = runtime.max([time.monotonic() > deadline, needed > room(runtime)])
    if short:
        return f"batch {2 * last.batch_size:,} would take about {needed / 2**20:,.0f} MiB, and there is less"
    if last.seconds_per_step > MOST_SECONDS_PER_STEP:
        return f"a step takes more than {MOST_SECONDS_PER_STEP:g} s"
    return f"{MOST_SECONDS:g} s are over" if late else ""


def measured(trainer: Trainer, size: int) -> Speed | None:
    """The speed of steps over batches of `size`; None if they run out of memory."""
    runtime, own = trainer.runtime, trainer.feed
    rank, world_size, _ = own.place
    feed = Feed(
        own.examples,
        batch_size=size,
        seed=own.seed,
        shuffle=own.shuffle,
        rank=rank,
        world_size=world_size,
        accumulate=trainer.config.accumulate,
        drop_last=trainer.recipe.drop_last,
    )
    free(trainer.optimizer_step)
    reset_peak_memory(runtime.device)
    try:
        seconds = time_steps(trainer, feed)
    except ShortOfMemory as short:
        if runtime.world_size > 1 and short.final:  # the other processes wait for this one
            raise
        return None
    seconds, memory = runtime.max([seconds, float(peak_memory(runtime.device))])
    return Speed(size, seconds, int(memory))


def time_steps(trainer: Trainer, feed: Feed) -> float:
    """The median time of a step over full batches, in seconds, after the warm-up steps (one if the first is slow)."""
    step, runtime = trainer.optimizer_step, trainer.runtime
    seconds: list[float] = []
    for batch in full_batches(trainer, feed):
        trainer.rates.scale(0.0)
        began = time.perf_counter()
        step(batch)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)
        seconds.append(time.perf_counter() - began)
        counted = seconds[WARMUP_STEPS:] if seconds[0] < LEAST_SECONDS else seconds[1:]
        runtime.alive()
        if not runtime.max([float(len(counted) < 3 or sum(counted) < LEAST_SECONDS)])[0]:
            break
    return statistics.median(counted)


def full_batches(trainer: Trainer, feed: Feed) -> Iterator[GlobalBatch]:
    """Full batches, epoch after epoch; a short last batch is left out."""
    epoch = 0
    while True:
        for batch in feed.epoch(epoch):
            if batch.size == feed.batch_size:
                yield batch
        epoch += 1


def conclusion(found: list[Speed], reason: str) -> list[str]:
    """The last lines: why it ended, and the smallest batch size that is nearly the fastest."""
    lines = [f"ended    {reason}"]
    if found:
        fastest = max(speed.examples_per_second for speed in found)
        enough = next(speed for speed in found if speed.examples_per_second >= ENOUGH * fastest)
        within = f"--batch-size {enough.batch_size} comes within {1 - ENOUGH:.0%} of it"
        lines.append(f"fastest  {fastest:,.0f} examples/s; {within}")
    return lines


def reset_peak_memory(device: torch.device) -> None:
    """Makes `peak_memory` count from now, if the system allows that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    machine.reset_peak_memory()


def peak_memory(device: torch.device) -> int:
    """The peak memory of this process since the reset, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return machine.peak_memory()


def room(runtime: Runtime) -> float:
    """Bytes that this process can use; beyond them Linux may kill it instead of refusing the allocation."""
    if runtime.device.type == "cuda":
        return math.inf
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", runtime.world_size))
    return machine.used_memory() + machine.free_memory() / processes
