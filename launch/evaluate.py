"""Evaluates a run: every example once, on any number of processes.

python launch/evaluate.py runs/mnist_cnn/first

This is `nndist evaluate`; --help shows more examples.
"""

import sys

from nndist.cli.main import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
