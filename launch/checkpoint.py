"""Shows, verifies and converts the checkpoints of a run.

python launch/checkpoint.py show runs/mnist_cnn/first

This is `nndist checkpoint`; --help shows more examples.
"""

import sys

from nndist.cli.main import main

if __name__ == "__main__":
    main(["checkpoint", *sys.argv[1:]])
