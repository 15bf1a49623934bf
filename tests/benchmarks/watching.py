"""What --fingerprint-every and --recheck-every cost: training with and without them, in one paired run.

    python tests/benchmarks/watching.py

Trainings of one recipe, which differ in that flag alone, take turns of a few steps in one process, in a drawn order, so
that a machine that slows down slows all. A round is as many steps as lie between two fingerprints or rechecks, so it
holds one; each ratio is to the mean of two trainings without flags in the same round. Time is CPU time of the process,
with one thread: what other programs take of a busy machine is no part of it, but what they push out of its caches is.
`none again` is the second of those without flags, over the first: how far a figure of this run can be trusted. Bar: the
median of --fingerprint-every is below 1.01. One process: what several send for a recheck is not in the figures.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from nndist.config import RunConfig
from nndist.distributed.runtime import Runtime
from nndist.recipe.loading import load_recipe
from nndist.runs.tracking import Tracker
from nndist.training.run import load_data
from nndist.training.trainer import Trainer

ROOT = Path(__file__).parent.parent.parent
BAR = 1.01
TURN = 10
"""Steps of one training before the next has its turn."""
FLAGS = ("none", "none again", "--fingerprint-every", "--recheck-every")


def trainer_of(name: str, flag: str, every: int, source: str, folder: Path) -> Trainer:
    """A training that is ready for its first step; its records go into the folder."""
    config = RunConfig(data_source=source, threads=1)
    if flag.startswith("--"):
        setattr(config, flag.removeprefix("--").replace("-", "_"), every)
    recipe = load_recipe(ROOT / f"recipes/{name}.py")()
    runtime = Runtime(threads=1)
    trainer = Trainer(recipe, config, runtime, load_data(recipe, config, runtime))
    trainer.begin()
    trainer.evaluate_every = 10**9
    (place := folder / flag.replace(" ", "-")).mkdir()
    trainer.tracker = Tracker(place, title=name, steps=10**9, progress=False)
    return trainer


def turn(trainer: Trainer, steps: int) -> float:
    """Seconds of CPU time for so many steps."""
    began, end = time.process_time(), trainer.step + steps
    while trainer.step < end:
        for batch in trainer.feed.epoch(trainer.epoch, trainer.batch):
            trainer.take_step(batch)
            if trainer.step == end:
                break
    return time.process_time() - began


def one_round(trainers: dict[str, Trainer], steps: int, draw: random.Random) -> dict[str, float]:
    """Seconds of CPU time of each training for so many steps."""
    seconds = dict.fromkeys(trainers, 0.0)
    for began in range(0, steps, TURN):
        for flag in draw.sample(list(trainers), len(trainers)):  # whoever comes first finds other caches
            seconds[flag] += turn(trainers[flag], min(TURN, steps - began))
    print(" ".join(f"{flag} {spent:.3f} s" for flag, spent in seconds.items()), file=sys.stderr, flush=True)
    return seconds


def ratio(seconds: dict[str, float], flag: str) -> float:
    """Of a training's time to that without flags; of the two of those, to each other."""
    first, second = seconds["none"], seconds["none again"]
    return second / first if flag == "none again" else 2 * seconds[flag] / (first + second)


def said_of(ratios: list[float]) -> str:
    """The median, and between which values half of them lie."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.4f} ({low:.4f} to {high:.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=["mnist_cnn", "sum_mlp"], help="default: mnist_cnn sum_mlp")
    parser.add_argument("--rounds", type=int, default=15, help="at least 2")
    parser.add_argument("--every", type=int, default=100, help="steps between two fingerprints or rechecks")
    parser.add_argument("--data-source", default="sample")
    options = parser.parse_args()
    print(f"ratios of CPU time to a training without flags, one fingerprint or recheck in {options.every} steps:")
    print(f"median of {options.rounds} rounds, and in brackets where the middle half lies")
    draw = random.Random(0)
    for name in options.recipes:
        with tempfile.TemporaryDirectory() as folder:
            trainers = {
                flag: trainer_of(name, flag, options.every, options.data_source, Path(folder)) for flag in FLAGS
            }
            for trainer in trainers.values():
                turn(trainer, options.every)  # what is done once, such as the factors of fingerprints
            rounds = [one_round(trainers, options.every, draw) for _ in range(options.rounds)]
            for trainer in trainers.values():
                trainer.tracker.close()
        milliseconds = 1e3 * statistics.median(one["none"] for one in rounds) / options.every
        print(f"\n{name:<20} {milliseconds:.3f} ms a step")
        for flag in FLAGS[1:]:
            ratios = [ratio(one, flag) for one in rounds]
            over = flag == "--fingerprint-every" and statistics.median(ratios) >= BAR
            print(f"{flag:<20} {said_of(ratios)}{f'   above the bar of {BAR}' if over else ''}", flush=True)
    print(f"\ntorch {torch.__version__}, one thread, {time.strftime('%Y-%m-%d')}")


if __name__ == "__main__":
    main()
