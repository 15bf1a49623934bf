"""What a process holds of a large network: whole, split over the processes, with its activations recomputed.

    python tests/benchmarks/sharding.py                  # some minutes, 6 GB of memory; --quick for a smaller network

Every row is a real launch of launch/train.py on CPUs, with AdamW. Memory is the largest resident size of any process
less what it had before its networks were made, in multiples of the weights too: once before the first checkpoint, once
after two checkpoints and an evaluation. Whole it is the weights, their gradients and two numbers of AdamW for each: 4
times the weights; split over N processes that is 4 / N, and at the start every process draws the whole network once.
Step times are medians over the records after the second.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PROBE = '''
import os, resource
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
import torch
import torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor  # else only some rows import them
import torch.nn.functional as F
from torch import nn, optim
from nndist.data import Data, Resident
from nndist.recipe import Recipe

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

@dataclass(kw_only=True)
class Probe(Recipe):
    """Residual blocks of two layers on random numbers."""
    width: int = 1024
    depth: int = 8
    batch_size: int = 24
    lr: float = 1e-4
    peaks: ClassVar[list] = []

    def data(self, config):
        x = torch.rand(20_000, 16, generator=torch.Generator().manual_seed(0))
        return Data(Resident(x), Resident(x[:64]))

    def networks(self):
        if not self.peaks:
            self.peaks.append(resident())
        return {"model": Stack(self.width, self.depth)}

    def optimizer(self, name, network):
        return optim.AdamW(network.parameters(), lr=self.lr)

    def loss(self, networks, batch):
        self.peaks.append(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        path = Path(os.environ["PEAKS"] + os.environ.get("RANK", "0"))
        path.write_text(" ".join(map(str, self.peaks)))
        return F.mse_loss(networks["model"](batch[0]), batch[0], reduction="none")

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.contract(F.gelu(self.expand(self.norm(x))))

class Stack(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.first, self.last = nn.Linear(16, width), nn.Linear(width, 16)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)
'''


def measured(folder: Path, recipe: Path, processes: int, *flags: str, before: int) -> tuple[float, float, float]:
    """(peak bytes before the first save, after all, median seconds of a step); raises RuntimeError.

    before: steps before the first save, of which each computes one loss per micro-batch.
    """
    command = [sys.executable]
    if processes > 1:
        config = ROOT / "launch/accelerate/cpu_ddp.yaml"
        command += ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
        command += ["--num_processes", str(processes)]
    run = "-".join([str(processes), *(flag.strip("-") for flag in flags if flag.startswith("--"))])
    command += [str(ROOT / "launch/train.py"), str(recipe), *flags, "--runs-dir", str(folder), "--run", run]
    command += ["--max-steps", "13", "--log-every", "1", "--save-every", f"{before} steps", "--keep", "1"]
    command += ["--threads", "1", "--wandb", "off", "--no-report", "--no-figures", "--no-progress"]
    command += ["--evaluate-every", f"{before} steps"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PEAKS": f"{folder}/{run}-", "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise RuntimeError(lines[-1] if lines else f"exit code {done.returncode}")
    peaks = [[int(n) for n in (folder / f"{run}-{rank}").read_text().split()] for rank in range(processes)]
    accumulate = int(flags[flags.index("--accumulate") + 1]) if "--accumulate" in flags else 1
    early = max(found[before * accumulate] - found[0] for found in peaks)
    late = max(found[-1] - found[0] for found in peaks)
    place = folder / recipe.stem / run
    records = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    speeds = [r["examples_per_second"] for r in records if "examples_per_second" in r][2:]
    described = json.loads((place / "run.json").read_text())
    return early, late, described["fields"]["batch_size"] / statistics.median(speeds)


def table(folder: Path, recipe: Path, weights: int, rows: list[tuple[str, int, list[str]]]) -> None:
    """Prints a line per row as soon as it is measured; `weights`: bytes of the network's weights, 0 where none."""
    for label, processes, flags in rows:
        try:
            early, late, seconds = measured(folder, recipe, processes, *flags, before=5)
        except RuntimeError as error:
            print(f"| {label} | {processes} | failed: {error} |", flush=True)
            continue
        times = [f"{size / weights:.1f} x" if weights else "" for size in (early, late)]
        sizes = [f"{size / 2**20:,.0f} MiB {times[n]}".strip() for n, size in enumerate((early, late))]
        print(f"| {label} | {processes} | {sizes[0]} | {sizes[1]} | {seconds:.2f} s |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="17 million parameters instead of 67")
    options = parser.parse_args()
    width, depth = (512, 8) if options.quick else (1024, 8)
    size = ["--width", str(width), "--depth", str(depth)]
    weights = 4 * (depth * (8 * width**2 + 7 * width) + 33 * width + 16)
    split = [*size, "--shard", "fsdp"]
    heading = "| how | processes | peak, training | peak, with two checkpoints | a step |\n|---|---|---|---|---|"
    with tempfile.TemporaryDirectory(prefix="nndist-sharding-") as scratch:
        folder = Path(scratch)
        probe = folder / "probe.py"
        probe.write_text(PROBE)
        print(f"{weights / 4e6:.0f} million parameters, weights of {weights / 2**20:,.0f} MiB\n\n{heading}", flush=True)
        rows = [("whole", 2, size), ("`--shard fsdp`", 2, split), ("whole", 3, size), ("`--shard fsdp`", 3, split)]
        rows += [("whole, `--accumulate 3`", 2, [*size, "--accumulate", "3"])]
        rows += [("`--shard fsdp --accumulate 3`", 2, [*split, "--accumulate", "3"])]
        table(folder, probe, weights, rows)
        print("\nnarrower blocks, 1,000 examples a step, so that activations are what counts\n")
        wide = ["--width", "256", "--depth", "4" if options.quick else "16", "--batch-size", "1000"]
        print(heading, flush=True)
        again = [*wide, "--checkpoint-activations"]
        rows = [("whole", 1, wide), ("`--checkpoint-activations`", 1, again)]
        rows += [("`--shard fsdp`", 2, [*wide, "--shard", "fsdp"])]
        rows += [("`--shard fsdp --checkpoint-activations`", 2, [*again, "--shard", "fsdp"])]
        table(folder, probe, 0, rows)


if __name__ == "__main__":
    main()
