"""How throughput grows with the number of processes, on paper: what a step computes, and what it waits for.

    python tests/benchmarks/throughput.py                                     # 8 to 4,096 GPUs, vendors' figures
    python tests/benchmarks/throughput.py --parameters 124e6 --step-ms 250    # your network, its step on one GPU
    python tests/benchmarks/throughput.py --measure                           # against runs of 1 to 4 processes here

With n processes, g of them on a machine, and B bytes of gradients (4 a parameter, 2 with --gradient-compression bf16):

- computing: the step of one process's share of the batch, with its fixed part; from `scaling.py` or a run's records;
- exchange: within a machine 2 (g - 1) / g B over its links; between N machines each of the g processes sums its part,
  2 (N - 1) / N B / g over its own network card; and 2 log2(n) latencies;
- overlap: with --gradient-sync ddp a bucket of 25 MB is sent as soon as it is whole, so that all but the last is hidden
  behind the backward pass, two thirds of the computing, where the exchange has hardware of its own. --no-overlap is
  for the default, which sends all gradients after it; and so on CPUs, which have no such hardware.

--measure finds what a sum over this machine's processes takes, and what a share of the step takes where as many
trainings that know nothing of each other run side by side (they share cores, caches and memory just so), and prints the
sum of both beside what 2, 3 and 4 processes take.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from scaling import ROOT, step_seconds

BUCKET_BYTES = 25e6
COLLECTIVES = """
import os, time, torch
import nndist.distributed.runtime
runtime = nndist.distributed.runtime.Runtime(cpu=True, threads=1)
for size in (1, 1_000_000):
    tensor, taken = torch.ones(size), []
    for _ in range(60):
        runtime.barrier()
        began = time.perf_counter()
        runtime.sum(tensor)
        taken.append(time.perf_counter() - began)
    if runtime.is_main:
        print(size, sorted(taken)[len(taken) // 2], flush=True)
runtime.barrier()
os._exit(0)
"""


@dataclass(frozen=True)
class Links:
    """Bytes per second of a process within a machine and to other machines, seconds of latency, processes a machine."""

    within: float
    between: float
    latency: float
    per_machine: int
    overlaps: bool


def exchange_seconds(processes: int, gradient_bytes: float, links: Links) -> float:
    """An all-reduce of the gradients."""
    if processes == 1:
        return 0.0
    group = min(processes, links.per_machine)
    machines = -(-processes // group)
    within = 2 * (group - 1) / group * gradient_bytes / links.within
    between = 2 * (machines - 1) / machines * gradient_bytes / group / links.between
    return within + between + 2 * math.log2(processes) * links.latency


def step(processes: int, compute: float, gradient_bytes: float, links: Links) -> tuple[float, float]:
    """Seconds of a step, and how many of them are spent waiting for gradients."""
    exchange = exchange_seconds(processes, gradient_bytes, links)
    if not links.overlaps:
        return compute + exchange, exchange
    last = exchange_seconds(processes, min(BUCKET_BYTES, gradient_bytes), links)
    exposed = max(last, exchange - 2 / 3 * compute) if processes > 1 else 0.0
    return compute + exposed, exposed


def on_paper(options: argparse.Namespace) -> None:
    links = Links(options.within, options.between, options.latency, 8, overlaps=options.overlap)
    compute = options.step_ms / 1e3
    print("| GPUs | fp32: exchange | waiting | throughput | bf16: exchange | waiting | throughput |")
    print("|---|---|---|---|---|---|---|")
    for processes in (1, 8, 16, 64, 512, 4096):
        cells = []
        for width in (4, 2):
            size = width * options.parameters
            seconds, exposed = step(processes, compute, size, links)
            share = processes * compute / seconds
            exchange = 1e3 * exchange_seconds(processes, size, links)
            cells += [f"{exchange:.1f} ms", f"{1e3 * exposed:.1f} ms", f"{share:,.0f} x ({share / processes:.0%})"]
        print(f"| {processes:,} | " + " | ".join(cells) + " |")


def sum_of(processes: int, script: Path) -> Callable[[float], float]:
    """Seconds of a sum over this machine's processes by its bytes: a line through two measured points."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    said = subprocess.run([*command, str(script)], capture_output=True, text=True, check=True).stdout.splitlines()
    small, large = (float(line.split()[1]) for line in said[:2])
    return lambda size: small + (large - small) * size / 4e6


def side_by_side(folder: Path, recipe: Path, batch: int, processes: int, threads: int, steps: int) -> float:
    """A step of one process's share where as many trainings that know nothing of each other run at the same time."""
    flags = ["--epochs", "1000", "--batch-size", str(batch // processes)]
    with ThreadPoolExecutor(processes) as pool:
        runs = [pool.submit(step_seconds, folder, recipe, flags, 1, threads, steps) for _ in range(processes)]
        return statistics.median(run.result() for run in runs)


def measured_here(options: argparse.Namespace) -> None:
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        script = folder / "collectives.py"
        script.write_text(COLLECTIVES)
        sums = {processes: sum_of(processes, script) for processes in (2, 3, 4)}
        for processes, seconds in sums.items():
            print(f"sum of {processes} processes: {1e3 * seconds(4):.2f} ms, of 1 MB {1e3 * seconds(1e6):.2f} ms")
        for recipe, batch, parameters, steps in (
            ("mnist_simple_cnn", 64, 225_034, 160),
            ("mnist_mlp", 256, 169_670, 600),
        ):
            path = ROOT / f"recipes/{recipe}.py"
            taken: dict[int, list[float]] = {}
            paper: dict[int, list[float]] = {}
            for _ in range(options.rounds):
                for processes in range(1, 5):
                    threads = max(1, cores // processes)
                    found = step_seconds(folder, path, ["--epochs", "50"], processes, threads, steps)
                    taken.setdefault(processes, []).append(found)
                    if processes > 1:
                        computing = side_by_side(folder, path, batch, processes, threads, steps)
                        paper.setdefault(processes, []).append(computing + sums[processes](4 * parameters))
            for processes, found in taken.items():
                line = f"{recipe:<18}{processes} processes: {1e3 * statistics.median(found):6.2f} ms"
                if processes > 1:
                    line += f", on paper {1e3 * statistics.median(paper[processes]):6.2f} ms"
                print(line)
    print(f"{cores} cores, {time.strftime('%Y-%m-%d')}, medians of {options.rounds} rounds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="real runs on this machine's CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parameters", type=float, default=25.6e6, help="of the network (ResNet-50's)")
    parser.add_argument("--step-ms", type=float, default=100.0, help="computing of a GPU's share of the batch")
    parser.add_argument("--within", type=float, default=450e9, help="bytes/s of a GPU to its neighbours (NVLink 4)")
    parser.add_argument("--between", type=float, default=50e9, help="bytes/s of a GPU's network card (400 Gbit/s)")
    parser.add_argument("--latency", type=float, default=10e-6, help="seconds of a message between machines")
    parser.add_argument("--no-overlap", dest="overlap", action="store_false", help="gradients are sent at the end")
    options = parser.parse_args()
    measured_here(options) if options.measure else on_paper(options)


if __name__ == "__main__":
    main()
