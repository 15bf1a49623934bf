"""Trains every recipe as it is documented, and prints the table of what came out beside what the documents say.

python launch/reproduce.py                              # all; hours on a laptop, of which none is lost when it is cut
python launch/reproduce.py sum_mlp two_clusters --seeds 20
python launch/reproduce.py --quick                      # 30 steps of each, to see that it runs here
python launch/reproduce.py mnist_cnn --write            # puts the new figures into README.md, too

Each training is a run of its own, RUNS_DIR/<recipe>/documented-seed<N>; the same command skips those that are finished
and goes on with those that were cut.
"""

import sys

from nndist.sweep_commands import reproduce_command

if __name__ == "__main__":
    reproduce_command(sys.argv[1:], __doc__ or "")
