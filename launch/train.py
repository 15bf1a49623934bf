"""Trains a recipe.

accelerate launch launch/train.py recipes/mnist_cnn.py
python launch/train.py recipes/mnist_cnn.py --help

This is `nndist train`; --help shows more examples.
"""

import sys

from nndist.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
