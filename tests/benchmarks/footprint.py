"""What a run takes before its first step, and its peak memory, against the least that there could be.

    python tests/benchmarks/footprint.py --data-source mnist

Start-up: from the command to the plan, after which the first step is taken, less what a script takes that imports
torch; by `python`, and by `accelerate launch`, whose launcher both have. Bar: 0.5 s. Data: until digits are tensors.
Bar: 0.3 s. Memory: the peak of 30 steps of mnist_simple_cnn and an evaluation, against those of a plain PyTorch loop
over the same tensors. Bar: 1.05. The kinds take turns; medians. On a busy machine the seconds of CPU say more.
"""

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from showing import cpu_seconds

ROOT = Path(__file__).parent.parent.parent
QUIET = ["--wandb", "off", "--no-report", "--no-figures", "--no-progress", "--threads", "1"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
IMPORTS = "import torch\nprint('run', flush=True)\nimport time\ntime.sleep(60)\n"
DATA = """
import sys, time, torch
from nndist.config import RunConfig
from nndist.recipe import load_recipe
recipe = load_recipe(sys.argv[1])()
began = time.perf_counter()
data = recipe.data(RunConfig(data_source=sys.argv[2]).data_config(download=False))
print(time.perf_counter() - began)
"""
RAW_LOOP = """
import resource, sys, torch
import torch.nn.functional as F
from nndist.config import RunConfig
from nndist.recipe import load_recipe
torch.set_num_threads(1)
recipe = load_recipe(sys.argv[1])()
data = recipe.data(RunConfig(data_source=sys.argv[2]).data_config(download=False))
network = recipe.networks()["model"]
optimizer = recipe.optimizer("model", network)
for batch in torch.randperm(len(data.train)).split(recipe.batch_size)[:30]:
    images, labels = data.prepare(tuple([t[batch] for t in data.train.tensors]))
    optimizer.zero_grad()
    F.cross_entropy(network(images), labels).backward()
    optimizer.step()
right = 0
with torch.no_grad():
    for batch in torch.arange(len(data.test)).split(1000):
        images, labels = data.prepare(tuple([t[batch] for t in data.test.tensors]))
        right += (network(images).argmax(1) == labels).sum().item()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
OUR_LOOP = """
import resource, sys
from nndist.cli import parse
from nndist.training.run import run
run(*parse(sys.argv[1:]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def until_run(command: list[str]) -> tuple[float, float]:
    """Seconds, and those of CPU, until a line that begins with "run"; what the command would do then is cut off."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    assert process.stdout is not None
    said = any(line.startswith("run") for line in process.stdout)
    seconds, cpu = time.perf_counter() - began, sum(cpu_seconds(process.pid).values())
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if not said:
        raise SystemExit(f"{' '.join(command)}: failed")
    return seconds, cpu


def number_said(script: str, *arguments: str) -> float:
    """The last line of a script's output."""
    command = [sys.executable, "-c", script, *arguments]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data-source", default="sample")
    options = parser.parse_args()
    cnn, source = str(ROOT / "recipes/mnist_simple_cnn.py"), options.data_source
    with tempfile.TemporaryDirectory() as folder:
        imports = Path(folder) / "imports.py"
        imports.write_text(IMPORTS)
        ours = [str(ROOT / "launch/train.py"), cnn, "--data-source", source, "--runs-dir", folder, *QUIET]
        starts: dict[str, list[tuple[float, float]]] = {}
        for number in range(options.rounds + 1):
            for name, launcher in (("python", [sys.executable]), ("accelerate launch", LAUNCH)):
                theirs = until_run([*launcher, str(imports)])
                found = until_run([*launcher, *ours])
                if number:  # the first round warms up the disk's cache
                    starts.setdefault(name, []).append((found[0] - theirs[0], found[1] - theirs[1]))
        for name, differences in starts.items():
            seconds, cpu = (statistics.median(column) for column in zip(*differences, strict=True))
            print(f"start-up by {name:<18} {seconds:6.2f} s above import torch (bar 0.50), {cpu:.2f} s of CPU")
        data = statistics.median(number_said(DATA, cnn, source) for _ in range(options.rounds))
        print(f"data                           {data:6.2f} s (bar 0.30)")
        raw = statistics.median(number_said(RAW_LOOP, cnn, source) for _ in range(options.rounds))
        steps = [cnn, "--data-source", source, "--runs-dir", folder, "--max-steps", "30", *QUIET]
        mine = statistics.median(number_said(OUR_LOOP, *steps) for _ in range(options.rounds))
        print(f"peak memory {mine:.0f} MiB, raw loop {raw:.0f} MiB: {mine / raw:.3f} (bar 1.05)")


if __name__ == "__main__":
    main()
