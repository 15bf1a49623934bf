"""Sends a run, or what is still missing of it, to an object store.

python launch/push.py runs/mnist_cnn/first s3://bucket/runs

This is `nndist push`; --help shows more examples.
"""

import sys

from nndist.cli.main import main

if __name__ == "__main__":
    main(["push", *sys.argv[1:]])
