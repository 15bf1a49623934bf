"""Trains every recipe as documented, and prints the results.

python launch/reproduce.py                          # all: hours on a laptop
python launch/reproduce.py sum_mlp two_clusters --seeds 20
python launch/reproduce.py --quick                  # 30 steps of each
python launch/reproduce.py mnist_cnn --write        # into recipes/README.md

Each training is a run, RUNS_DIR/<recipe>/documented-seed<N>; the same command
skips finished runs and resumes those that were interrupted. The table has the
document's figure, ours, the data and the time, and names the device.
"""

import sys

from nndist.cli.experiment_commands import reproduce_command

if __name__ == "__main__":
    reproduce_command(sys.argv[1:], __doc__ or "")
