r"""Submits a training to Slurm: launch/slurm/train.sbatch with your settings.

python launch/submit.py recipes/mnist_cnn.py --nodes 2 --gpus-per-node 8 \
    --time 12:00:00 --epochs 20

This is `nndist submit`; --help shows more examples.
"""

import sys

from nndist.cli.main import main

if __name__ == "__main__":
    main(["submit", *sys.argv[1:]])
