"""Takes a step of a run again, bit for bit, and shows what happened in it.

python launch/replay.py runs/mnist_cnn/first --step 412

This is `nndist replay`; --help shows more examples.
"""

import sys

from nndist.cli.main import main

if __name__ == "__main__":
    main(["replay", *sys.argv[1:]])
