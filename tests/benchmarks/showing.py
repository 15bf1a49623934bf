"""What it costs that a run can be looked at: W&B, report page, figures and records, against a run without them.

    python tests/benchmarks/showing.py --data-source mnist --epochs 1 --pairs 3

mnist_cnn at its documented settings; the embedded digits (the default) make runs of seconds, in which the start of the
W&B client weighs more than it does in a whole training. The two kinds of run alternate. Bars: training at most 2 %
slower (median of the ratios of seconds per example after the start, evaluations and reports counted in), and at most
3 s more at start-up and end. On a machine whose speed moves by more than that, the seconds of CPU say more: those that
the processes of W&B take beside the training's, which are the same for one epoch or ten.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FLAGS = {
    "everything": ["--wandb", "offline"],
    "nothing": ["--wandb", "off", "--no-report", "--no-figures"],
}


def cpu_seconds(of: int) -> dict[int, float]:
    """Seconds of CPU that a process and its descendants have taken so far, by process."""
    parents, taken = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            pid = int(stat.parent.name)
            parents[pid], taken[pid] = int(fields[1]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    found = {of}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: taken[pid] for pid in found if pid in taken}


def measure(kind: str, epochs: int, source: str, folder: Path) -> tuple[float, float, float, float]:
    """Seconds from the first record to the last, all other seconds, CPU of the training and of W&B's processes."""
    arguments = [ROOT / "recipes/mnist_cnn.py", "--epochs", epochs, "--data-source", source, "--no-progress"]
    arguments += ["--runs-dir", folder, "--run", kind, "--evaluate-every", "1 epoch", *FLAGS[kind]]
    metrics = folder / "mnist_cnn" / kind / "metrics.jsonl"
    began = time.monotonic()
    training = subprocess.Popen(
        [sys.executable, ROOT / "launch/train.py", *map(str, arguments)], stdout=subprocess.DEVNULL
    )
    first = last = seen = 0.0
    cpu: dict[int, float] = {}
    looked = 0.0
    while training.poll() is None:
        if time.monotonic() > looked + 0.2:
            cpu |= cpu_seconds(training.pid)
            looked = time.monotonic()
        size = metrics.stat().st_size if metrics.exists() else 0
        if size != seen:
            first, last, seen = first or time.monotonic(), time.monotonic(), size
        time.sleep(0.005)
    assert training.returncode == 0
    wall = time.monotonic() - began
    assert json.loads(metrics.read_text().splitlines()[-1])["epoch"] == epochs
    own = cpu.pop(training.pid)
    return last - first, wall - (last - first), own, sum(cpu.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--data-source", default="sample", help="mnist: real MNIST from $NNDIST_DATA")
    options = parser.parse_args()
    ratios, extra = [], []
    for number in range(options.pairs):
        found = {}
        for kind in [*FLAGS][:: 1 if number % 2 else -1]:
            with tempfile.TemporaryDirectory() as folder:
                found[kind] = measure(kind, options.epochs, options.data_source, Path(folder))
        ratios.append(found["everything"][0] / found["nothing"][0])
        extra.append(found["everything"][1] - found["nothing"][1])
        own, others = found["everything"][2:]
        print(
            f"pair {number + 1}: training x {ratios[-1]:.3f}, start and end {extra[-1]:+.2f} s; "
            f"CPU of the training {own:.1f} s, without all that {found['nothing'][2]:.1f} s, of W&B {others:.1f} s",
            flush=True,
        )
    print(f"median: training x {statistics.median(ratios):.3f} (bar 1.02), ", end="")
    print(f"start and end {statistics.median(extra):+.2f} s (bar 3.00)")


if __name__ == "__main__":
    main()
