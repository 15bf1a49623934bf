"""Exports a network of a run for other programs and compares its answers.

python launch/export.py runs/mnist_cnn/first --to onnx --output digits.onnx

This is `nndist export`; --help shows more examples.
"""

import sys

from nndist.cli.main import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
