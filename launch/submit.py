r"""Submits a training to Slurm: launch/slurm/train.sbatch with your settings.

python launch/submit.py recipes/mnist_cnn.py --nodes 2 --gpus-per-node 8 \
    --time 12:00:00 --epochs 20
python launch/submit.py recipes/mnist_cnn.py --sbatch=--partition=a100 \
    --sbatch=--account=physics --dry-run
python launch/submit.py recipes/mnist_cnn.py --gpus-per-node 0 \
    --processes-per-node 4                       # on CPUs
"""

import sys

from nndist.cli.commands import submit_command

if __name__ == "__main__":
    submit_command(sys.argv[1:], __doc__ or "")
