r"""Predicts with the networks of a run: answers to your own inputs.

python launch/predict.py runs/mnist_cnn/first digit.png photographs/ \
    --picture answers.png

This is `nndist predict`; --help shows more examples.
"""

import sys

from nndist.cli.main import main

if __name__ == "__main__":
    main(["predict", *sys.argv[1:]])
