"""Sends a run to Weights & Biases as one clean run: python launch/sync.py runs/mnist_cnn/first"""

import sys

from nndist.cli import sync_command

if __name__ == "__main__":
    sync_command(sys.argv[1:])
