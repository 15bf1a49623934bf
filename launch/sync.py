"""Sends a run to Weights & Biases as one clean run, built from its metrics.jsonl.

python launch/sync.py runs/mnist_cnn/first              # with an API key

This is `nndist sync`; --help shows more examples.
"""

import sys

from nndist.cli.main import main

if __name__ == "__main__":
    main(["sync", *sys.argv[1:]])
