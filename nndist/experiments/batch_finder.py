"""Throughput against batch size: how large a batch pays, and how large a one fits; nothing is trained or written."""

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
WARM_STEPS = 2
LEAST_SECONDS = 0.4  # of steps that are measured
ENOUGH = 0.95  # of the highest throughput


@dataclasses.dataclass
class Speed:
    """What steps over batches of one size took: the median, and the most memory that a process had, in bytes."""

    batch_size: int
    seconds_per_step: float
    memory: int

    @property
    def examples_per_second(self) -> float:
        """Of all processes together."""
        return self.batch_size / self.seconds_per_step


def find_batch(recipe: Recipe, config: RunConfig) -> list[Speed]:
    """Measures steps over batches of 1, 2, 4, ... examples; prints and gives the table.

    It begins with one per process, with two where there is BatchNorm.

    It ends where memory is short or would be, where a step takes more than 2 s, after a minute, or at the size of the
    training set. The learning rate is 0: it is throughput that is measured, not learning. Raises UserError.
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
    for network in trainer.networks.values():
        network.train()
    least = max(runtime.world_size, trainer.feed.least)
    sizes = [1 << power for power in range(most.bit_length()) if least <= 1 << power]
    found: list[Speed] = []
    reason, deadline = "", time.monotonic() + MOST_SECONDS
    shown_too = config.progress and runtime.is_main and sys.stderr.isatty()  # elsewhere the rows show it well enough
    with bar(len(sizes), "batch sizes", shown=shown_too) as progress:
        for size in sizes:
            reason = obstacle(found, runtime, deadline)
            speed = None if reason else measured(trainer, size)
            if speed is None:
                reason = reason or f"batch {size:,} runs out of memory"
                break
            found.append(speed)
            if runtime.is_main:
                of = f"{speed.examples_per_second:>12,.0f} {speed.memory / 2**20:>8,.0f} MiB"
                progress.write(f"{size:>10,} {1e3 * speed.seconds_per_step:>12.4g} {of}")
                sys.stdout.flush()
            progress.update()
    if runtime.is_main:
        print("\n".join(conclusion(found, reason or f"the training set has {most:,} examples")), flush=True)
    return found


def obstacle(found: list[Speed], runtime: Runtime, deadline: float) -> str:
    """Why the next size is not tried, the same on all processes, or ""."""
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
    """The speed of steps over batches of `size`, None where memory is short for them."""
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
        if runtime.world_size > 1 and short.final:  # the others wait for this one
            raise
        return None
    seconds, memory = runtime.max([seconds, float(peak_memory(runtime.device))])
    return Speed(size, seconds, int(memory))


def time_steps(trainer: Trainer, feed: Feed) -> float:
    """The median time of a step over whole batches, in seconds, once the engine is warm."""
    engine, runtime = trainer.optimizer_step, trainer.runtime
    seconds: list[float] = []
    for batch in whole_batches(trainer, feed):
        trainer.rates.scale(0.0)
        began = time.perf_counter()
        engine(batch)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)
        seconds.append(time.perf_counter() - began)
        warm = seconds[WARM_STEPS:] if seconds[0] < LEAST_SECONDS else seconds[1:]
        runtime.alive()
        if not runtime.max([float(len(warm) < 3 or sum(warm) < LEAST_SECONDS)])[0]:
            break
    return statistics.median(warm)


def whole_batches(trainer: Trainer, feed: Feed) -> Iterator[GlobalBatch]:
    """Batches of the size in question, epoch after epoch."""
    epoch = 0
    while True:
        for batch in feed.epoch(epoch):
            if batch.size == feed.batch_size:
                yield batch
        epoch += 1


def conclusion(found: list[Speed], reason: str) -> list[str]:
    """Why it ended, and which size is enough."""
    lines = [f"ended    {reason}"]
    if found:
        fastest = max(speed.examples_per_second for speed in found)
        enough = next(speed for speed in found if speed.examples_per_second >= ENOUGH * fastest)
        within = f"--batch-size {enough.batch_size} comes within {1 - ENOUGH:.0%} of it"
        lines.append(f"fastest  {fastest:,.0f} examples/s; {within}")
    return lines


def reset_peak_memory(device: torch.device) -> None:
    """Has `peak_memory` begin from now, where the system lets it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    machine.reset_peak_memory()


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process had since the reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return machine.peak_memory()


def room(runtime: Runtime) -> float:
    """Bytes that this process can have before the system ends it rather than refuse them, as Linux may."""
    if runtime.device.type == "cuda":
        return math.inf
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", runtime.world_size))
    return machine.used_memory() + machine.free_memory() / processes
