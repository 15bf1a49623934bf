"""Proves a recipe's promises on this machine: python launch/verify.py recipes/mnist_cnn.py [flags]."""

import sys

from nndist.cli import verify_command

if __name__ == "__main__":
    verify_command(sys.argv[1:])
