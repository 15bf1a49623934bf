"""What a training step costs as things grow: parameters, batch, training set, processes; each with its straight line.

    python tests/benchmarks/scaling.py                  # some minutes; --quick for fewer points
    python tests/benchmarks/scaling.py --only processes --recipe recipes/mnist_mlp.py

Every point is a real launch of launch/train.py; a step's time is the median over the records of metrics.jsonl after the
first two, so that what happens once (start-up, the first step) is not in it. The line is fitted by least
squares: cost = fixed + slope * size; the largest deviation from it says how straight it is. Where a point fails, its
last line is printed: that is what breaks first.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PROBE = '''
from dataclasses import dataclass
import torch
import torch.nn.functional as F
from torch import nn, optim
from nndist.data import Data, Resident
from nndist.recipe import Classifier

@dataclass(kw_only=True)
class Probe(Classifier):
    """Three layers on random numbers."""
    width: int = 256
    examples: int = 20_000

    def data(self, config):
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(256, (self.examples, 64), generator=generator, dtype=torch.uint8)
        y = torch.randint(10, (self.examples,), generator=generator)
        return Data(Resident(x, y), Resident(x[:100], y[:100]), prepare=lambda b: (b[0].float() / 255, b[1]))

    def networks(self):
        w = self.width
        return {"model": nn.Sequential(nn.Linear(64, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, 10))}

    def optimizer(self, name, network):
        return optim.SGD(network.parameters(), lr=0.01)
'''
SIZES = {
    "parameters": [64, 128, 256, 512, 1024, 2048],  # width
    "batch": [16, 64, 256, 1024, 4096],
    "examples": [10_000, 100_000, 1_000_000, 10_000_000],
    "processes": [1, 2, 3, 4],
}


def step_seconds(folder: Path, recipe: Path, flags: list[str], processes: int, threads: int, steps: int) -> float:
    """The median time of a step; raises RuntimeError with the last line of a launch that fails."""
    command = [sys.executable]
    if processes > 1:
        config = ROOT / "launch/accelerate/cpu_ddp.yaml"
        command += ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
        command += ["--num_processes", str(processes)]
    run = f"{time.monotonic_ns()}"
    command += [str(ROOT / "launch/train.py"), str(recipe), *flags, "--runs-dir", str(folder), "--run", run]
    command += ["--max-steps", str(steps), "--log-every", str(max(1, steps // 12)), "--threads", str(threads)]
    command += ["--wandb", "off", "--no-report", "--no-figures", "--no-progress", "--data-source", "sample"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise RuntimeError(lines[-1] if lines else f"exit code {done.returncode}")
    records = [json.loads(line) for line in (folder / recipe.stem / run / "metrics.jsonl").read_text().splitlines()]
    described = json.loads((folder / recipe.stem / run / "run.json").read_text())
    speeds = [r["examples_per_second"] for r in records if "examples_per_second" in r][2:]
    return described["fields"]["batch_size"] / statistics.median(speeds)


def line(sizes: list[float], costs: list[float]) -> tuple[float, float, float]:
    """(fixed, slope, largest relative deviation) of the line of least squares."""
    slope, fixed = statistics.linear_regression(sizes, costs)
    off = max(abs(fixed + slope * x - y) / y for x, y in zip(sizes, costs, strict=True))
    return fixed, slope, off


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SIZES), action="append")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/mnist_simple_cnn.py", help="for processes")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        probe = folder / "probe.py"
        probe.write_text(PROBE)
        for what in options.only or SIZES:
            sizes = SIZES[what][:: 2 if options.quick else 1]
            taken, costs = [], []
            for size in sizes:
                recipe, flags, processes, threads, unit = probe, [], 1, 1, float(size)
                if what == "parameters":
                    flags, unit = ["--width", str(size)], 64 * size + size * size + 12 * size + 10.0
                elif what == "processes":
                    recipe, processes, threads = options.recipe, size, max(1, cores // size)
                else:
                    flags = [f"--{what.replace('batch', 'batch-size')}", str(size)]
                    if what == "batch":
                        flags += ["--examples", str(max(20_000, 12 * size))]
                try:
                    cost = step_seconds(folder, recipe, [*flags, "--epochs", "1000"], processes, threads, options.steps)
                except RuntimeError as error:
                    print(f"{what} {size:,}: {error}", flush=True)
                    break
                taken.append(unit)
                costs.append(cost)
                shown = f"{size:,}" if what != "parameters" else f"{int(unit):,}"
                print(f"{what:<11}{shown:>12}{1e3 * cost:>10.3f} ms per step", flush=True)
            if what == "processes":
                print("            ratio to 1 process: " + ", ".join(f"{cost / costs[0]:.2f}" for cost in costs))
            elif len(taken) > 2:
                fixed, slope, off = line(taken, costs)
                print(f"            {1e6 * fixed:.0f} us + {1e9 * slope:.3g} ns each; off by {off:.0%} at most")


if __name__ == "__main__":
    main()
