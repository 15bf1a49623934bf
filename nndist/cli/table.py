"""The sub-commands of `nndist`: what each is called, the function that it is, and what its --help begins with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from ..files import RECIPES


class Command(NamedTuple):
    """function: "module:function" in nndist.cli. help: one line. examples: what follows it in --help."""

    function: str
    help: str
    examples: str

    @property
    def text(self) -> str:
        """What --help begins with."""
        return f"{self.help}\n\n{self.examples.strip()}"


COMMANDS = {
    "train": Command(
        "train:train_command",
        "Trains a recipe: a short Python module that says what to train.",
        """
nndist train mnist_cnn --epochs 3 --run first
nndist train mnist_cnn --help                  # the recipe's flags
nndist train my_net.py --check                 # one step, which is not kept
accelerate launch -m nndist train mnist_cnn    # as `accelerate config` says
torchrun --nproc-per-node 2 -m nndist train mnist_cnn --run-name second

usage: nndist train RECIPE [FLAGS]

RECIPE is the name of a shipped recipe or the file of one. nndist recipes lists
them, nndist new writes one to start from. In a checkout it is launch/train.py.
""",
    ),
    "evaluate": Command(
        "run_commands:evaluate_command",
        "Evaluates a run: every example once, on any number of processes.",
        r"""
nndist evaluate runs/mnist_cnn/first
nndist evaluate runs/mnist_cnn/first --data-source kmnist \
    --figure confusion.png
torchrun --nproc-per-node 2 -m nndist evaluate runs/mnist_cnn/first --json

It uses the run's own test sets or a different data set, and prints what each
class was taken for.
""",
    ),
    "predict": Command(
        "run_commands:predict_command",
        "Predicts with the networks of a run: answers to your own inputs.",
        r"""
nndist predict runs/mnist_cnn/first digit.png photographs/ \
    --picture answers.png
nndist predict runs/sum_mlp/first numbers.csv --json
nndist predict runs/text_classifier_mlp/first 'guten Morgen'
nndist predict runs/mnist_gan/first --num 50 --picture digits.png
""",
    ),
    "export": Command(
        "run_commands:export_command",
        "Exports a network for other programs and compares its answers.",
        r"""
nndist export runs/mnist_cnn/first --to onnx --output digits.onnx
nndist export runs/mnist_rnn/first --to torch-export --output digits.pt2
nndist export runs/mnist_gan/first --to safetensors --network generator \
    --output generator.safetensors
""",
    ),
    "report": Command(
        "commands:report_command",
        "Writes the pages of runs: for a browser, no network needed.",
        """
nndist report runs                    # runs/index.html, all runs
nndist report runs/mnist_cnn/first    # the report.html of one run
nndist report runs/mnist_cnn/first --csv metrics.csv
""",
    ),
    "watch": Command(
        "commands:watch_command",
        "Shows runs in a browser while they train: the curves grow.",
        """
nndist watch runs                    # all runs, and the page of each
nndist watch runs/mnist_cnn/first
nndist watch runs --port 0           # any free port

It only reads, and answers to this machine alone: from another one,
`ssh -L 7433:localhost:7433 MACHINE`. --host 0.0.0.0 lets everybody see the runs
who reaches this machine. Ctrl-C ends it.
""",
    ),
    "compare": Command(
        "experiment_commands:compare_command",
        "Compares runs, or values of a recipe's fields over several seeds.",
        r"""
nndist compare sum_mlp --vary lr=0.001,0.003 --seeds 3
nndist compare sum_mlp --vary lr=0.001,0.003 --vary batch_size=32,128 \
    --epochs 1 --jobs 2
nndist compare sum_mlp --search optuna --trials 30 --vary lr=1e-4..1e-1 \
    --score test/loss
nndist compare table_mlp --folds 5
nndist compare runs/mnist_cnn/first runs/mnist_cnn/second

Each training is a run, RUNS_DIR/<recipe>/<values>-seed<N>; the same command
skips finished runs and resumes those that were interrupted.
Table, numbers and figure are written to RUNS_DIR/<recipe>/compare-<name>/.
""",
    ),
    "reproduce": Command(
        "experiment_commands:reproduce_command",
        "Trains every recipe as documented, and prints the results.",
        """
nndist reproduce                          # all: hours on a laptop
nndist reproduce sum_mlp two_clusters --seeds 20
nndist reproduce --quick                  # 30 steps of each
nndist reproduce mnist_cnn --write        # into recipes/README.md
nndist reproduce two_clusters --audit     # a stretch of it trained again

Each training is a run, RUNS_DIR/<recipe>/documented-seed<N>; the same command
skips finished runs and resumes those that were interrupted. The table has the
document's figure, ours, the data and the time, and names the device.
""",
    ),
    "verify": Command(
        "commands:verify_command",
        "Proves a recipe's promises on this machine, with real kill -9.",
        """
nndist verify mnist_cnn --data-source sample
nndist verify my_net.py --steps 100 --kills 8 --lr 0.1
nndist verify my_net.py --no-elastic --json
""",
    ),
    "replay": Command(
        "proof_commands:replay_command",
        "Takes a step of a run again and shows what happened in it.",
        r"""
nndist replay runs/mnist_cnn/first --step 412
nndist replay runs/mnist_cnn/first --step 412 --vary lr=0.05 --for 200
torchrun --nproc-per-node 2 -m nndist replay runs/mnist_cnn/first --step 412

It trains from the checkpoint before the step, prints its examples' losses,
gradients and updates, and where the first number that was not finite came from;
RUN/replay/ gets a page. --vary continues from there with another value,
beside the original. The run itself is not changed.
""",
    ),
    "bisect": Command(
        "proof_commands:bisect_command",
        "Says why two runs differ: the first step, and the operation in it.",
        """
nndist bisect runs/mnist_cnn/first runs/mnist_cnn/second

It compares what the runs say of themselves, their records and checkpoints, then
trains both again from the last common checkpoint, and observes the first step
whose weights differ: different examples, contents or random numbers, or
the first operation with a different result, its module and its line.
""",
    ),
    "audit": Command(
        "proof_commands:audit_command",
        "Audits a run: its hashes, and stretches of it trained again.",
        """
nndist audit runs/mnist_cnn/first
nndist audit runs/mnist_cnn/first --stretches 5 --json

It needs the run's kind of machine, number of processes and threads, and
releases. The more checkpoints the run kept (--keep 10), the shorter the
stretches.
""",
    ),
    "new": Command(
        "commands:new_command",
        "Writes a commented recipe to start from.",
        """
nndist new my_net.py --like mnist_cnn   # like one that `nndist recipes` lists
nndist new my_net.py                    # a small regression
""",
    ),
    "recipes": Command(
        "commands:recipes_command",
        "Lists the recipes: what they are and what they reach.",
        """
nndist recipes
nndist recipes my_recipes --markdown
""",
    ),
    "shard": Command(
        "commands:shard_command",
        "Makes shards of a folder of images, for imagenet_resnet.",
        """
nndist shard FOLDER OUT
nndist shard FOLDER OUT --shard-size 250    # megabytes of a shard

FOLDER holds train/<class>/*.JPEG and val/<class>/*.JPEG.
""",
    ),
    "submit": Command(
        "commands:submit_command",
        "Submits a training to Slurm, or prints the script of the job.",
        r"""
nndist submit mnist_cnn --nodes 2 --gpus-per-node 8 --time 12:00:00 --epochs 20
nndist submit mnist_cnn --sbatch=--partition=a100 \
    --sbatch=--account=physics --dry-run
nndist submit mnist_cnn --gpus-per-node 0 --processes-per-node 4    # on CPUs
""",
    ),
    "sync": Command(
        "commands:sync_command",
        "Sends a run to Weights & Biases, as one clean run.",
        """
nndist sync runs/mnist_cnn/first              # with an API key
nndist sync runs/mnist_cnn/first --offline    # to be sent later

It is one W&B run, however often the training was interrupted. --offline
writes wandb/offline-run-... into the run's folder.
""",
    ),
    "push": Command(
        "commands:push_command",
        "Sends a run, or what is still missing of it, to an object store.",
        """
nndist push runs/mnist_cnn/first s3://bucket/runs

A training with --runs-dir s3://bucket/runs does so by itself; this sends what
it could not, or a run that was trained without. The run is then in
s3://bucket/runs/mnist_cnn/first, for --runs-dir and all commands that take
a run. Any URL that fsspec knows will do: gs://, az://, hf://, file://.
""",
    ),
    "checkpoint": Command(
        "commands:checkpoint_command",
        "Shows, verifies and converts the checkpoints of a run.",
        """
nndist checkpoint show runs/mnist_cnn/first
nndist checkpoint verify runs/mnist_cnn/first
nndist checkpoint convert runs/mnist_cnn/first out.safetensors

show prints steps, scores and sizes. verify compares every file with its hash;
the exit code is 1 if one differs. convert writes only the weights, of the
newest checkpoint or of --step N; with --ema their EMA (moving average).
""",
    ),
    "completion": Command(
        "completion:completion_command",
        "Prints what completes commands, recipes and flags in a shell.",
        """
nndist completion bash    # add it to ~/.bash_completion
nndist completion zsh     # keep it as _nndist in a folder of $fpath
""",
    ),
    "doctor": Command(
        "doctor:doctor_command",
        "Shows this machine and what a training would choose on it.",
        """
nndist doctor    # one screen, to be pasted into a bug report
""",
    ),
}


def is_recipe(word: str) -> bool:
    """Whether a word is a recipe's: a Python file, perhaps with a class, or a shipped one's name and no path."""
    if re.search(r"\.py(:\w+)?$", word):
        return True
    return not Path(word).exists() and (RECIPES / f"{word}.py").is_file()
