"""The cost of the shared loop: its step against a raw PyTorch loop that does the same work, in one paired run.

    python tests/benchmarks/loop.py

Both keep the data as uint8 in memory, gather a batch by index, prepare it, take the same optimizer step, and use the
same layout, threads and allocator settings; the raw loop does nothing else. They alternate, so that a machine that
slows down slows both; the figure is the median of the ratios of the pairs. Bars: at most 1.05 for the CNN and 1.2 for
the small MLP.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from nndist.config import RunConfig
from nndist.data.sets import permutation
from nndist.distributed.runtime import Runtime
from nndist.recipe.loading import load_recipe
from nndist.runs.tracking import Tracker
from nndist.training.run import load_data
from nndist.training.trainer import Trainer

ROOT = Path(__file__).parent.parent.parent


def raw_steps(recipe, data, runtime, num_steps, epoch):
    """Seconds for steps of a loop written by hand."""
    network = RAW.setdefault("network", runtime.place(recipe.networks()["model"]).train())
    optimizer = RAW.setdefault("optimizer", recipe.optimizer("model", network))
    loss_function = F.cross_entropy if "mnist" in recipe.name else F.mse_loss
    batches = permutation(len(data.train), 0, epoch).split(recipe.batch_size)[:num_steps]
    tensors = data.train.tensors
    start = time.perf_counter()
    for batch in batches:
        inputs, targets, *_ = data.prepare(tuple([t.index_select(0, batch) for t in tensors]))
        loss = loss_function(network(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - start) / len(batches)


RAW: dict = {}


def our_steps(trainer, num_steps, epoch):
    """Seconds for steps of the shared loop, with its records and its progress bar."""
    trainer.step = 0
    trainer.last_step = 10**9
    trainer.evaluate_every = 10**9
    start = time.perf_counter()
    done = 0
    for batch in trainer.feed.epoch(epoch):
        trainer.take_step(batch)
        done += 1
        if done == num_steps:
            break
    trainer.log()
    return (time.perf_counter() - start) / done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--data-source", default="sample")
    options = parser.parse_args()
    print(f"{'recipe':<18}{'raw ms':>10}{'nndist ms':>12}{'ratio':>8}   (medians of {options.pairs} pairs)")
    for name, num_steps, threads in (("mnist_cnn", 20, None), ("mnist_mlp", 15, None), ("sum_mlp", 1500, 1)):
        RAW.clear()
        recipe = load_recipe(ROOT / f"recipes/{name}.py")()
        config = RunConfig(data_source=options.data_source, threads=threads)
        runtime = Runtime(threads=threads)
        data = load_data(recipe, config, runtime)
        trainer = Trainer(recipe, config, runtime, data)
        trainer.begin()
        with tempfile.TemporaryDirectory() as folder:
            trainer.tracker = Tracker(Path(folder), title=name, steps=10**9, progress=True)
            pairs = []
            for number in range(options.pairs + 1):
                first = raw_steps(recipe, trainer.data, runtime, num_steps, number)
                pairs.append((first, our_steps(trainer, num_steps, number)))
            trainer.tracker.close()
        pairs = pairs[1:]  # the first pair warms up
        raw, ours = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        print(f"\r{name:<18}{raw:>10.3f}{ours:>12.3f}{ratio:>8.3f}", flush=True)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}")


if __name__ == "__main__":
    main()
