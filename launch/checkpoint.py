"""Looks into the checkpoints of a run.

python launch/checkpoint.py show runs/mnist_cnn/first              # steps, scores, sizes
python launch/checkpoint.py verify runs/mnist_cnn/first            # every byte against its hash; exit code 1 if damaged
python launch/checkpoint.py convert runs/mnist_cnn/first out.safetensors [--step N] [--ema]
"""

import sys

from nndist.commands import checkpoint_command

if __name__ == "__main__":
    checkpoint_command(sys.argv[1:], __doc__ or "")
