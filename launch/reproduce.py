"""Trains every recipe as it is documented, and prints what came out.

python launch/reproduce.py                          # all: hours on a laptop
python launch/reproduce.py sum_mlp two_clusters --seeds 20
python launch/reproduce.py --quick                  # 30 steps of each: they run
python launch/reproduce.py mnist_cnn --write        # into recipes/README.md

Each training is a run, RUNS_DIR/<recipe>/documented-seed<N>; the same command
skips those that are finished and goes on with those that were cut. The table
has the document's figure, ours, the data and the time, and names the device.
"""

import sys

from nndist.cli.experiment_commands import reproduce_command

if __name__ == "__main__":
    reproduce_command(sys.argv[1:], __doc__ or "")
