r"""Compares values of a recipe's fields, or runs: a table over seeds, and curves.

python launch/compare.py recipes/sum_mlp.py --vary lr=0.001,0.003 --seeds 3
python launch/compare.py recipes/sum_mlp.py --vary lr=0.001,0.003 \
    --vary batch_size=32,128 --epochs 1 --jobs 2
python launch/compare.py runs/mnist_cnn/first runs/mnist_cnn/second

Each training is a run, RUNS_DIR/<recipe>/<values>-seed<N>; the same command
skips finished runs and resumes those that were interrupted.
Table, numbers and figure are written to RUNS_DIR/<recipe>/compare-<name>/.
"""

import sys

from nndist.cli.experiment_commands import compare_command

if __name__ == "__main__":
    compare_command(sys.argv[1:], __doc__ or "")
