"""Shows, verifies and converts the checkpoints of a run.

python launch/checkpoint.py show runs/mnist_cnn/first
python launch/checkpoint.py verify runs/mnist_cnn/first
python launch/checkpoint.py convert runs/mnist_cnn/first out.safetensors

show prints steps, scores and sizes. verify compares every file with its hash;
the exit code is 1 if one differs. convert writes only the weights, of the
newest checkpoint or of --step N; with --ema their moving average.
"""

import sys

from nndist.cli.commands import checkpoint_command

if __name__ == "__main__":
    checkpoint_command(sys.argv[1:], __doc__ or "")
