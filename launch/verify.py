"""Proves a recipe's promises on this machine: real processes, real kill -9.

python launch/verify.py recipes/mnist_cnn.py --data-source sample

This is `nndist verify`; --help shows more examples.
"""

import sys

from nndist.cli.main import main

if __name__ == "__main__":
    main(["verify", *sys.argv[1:]])
