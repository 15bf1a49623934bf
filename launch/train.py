"""Trains a recipe.

accelerate launch launch/train.py recipes/mnist_cnn.py
python launch/train.py recipes/mnist_cnn.py --help
"""

import sys

from nndist.cli.train import train_command

if __name__ == "__main__":
    train_command(sys.argv[1:])
