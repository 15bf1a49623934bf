"""Looks into the checkpoints of a run.

python launch/checkpoint.py show runs/mnist_cnn/first
python launch/checkpoint.py verify runs/mnist_cnn/first
python launch/checkpoint.py convert runs/mnist_cnn/first out.safetensors

show prints steps, scores and sizes. verify compares every byte with its hash;
the exit code is 1 where one differs. convert writes the weights alone, of the
newest checkpoint or --step N; with --ema those of the moving average.
"""

import sys

from nndist.cli.commands import checkpoint_command

if __name__ == "__main__":
    checkpoint_command(sys.argv[1:], __doc__ or "")
