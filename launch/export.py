r"""Exports a network of a run for other programs and compares its answers.

python launch/export.py runs/mnist_cnn/first --to onnx --output digits.onnx
python launch/export.py runs/mnist_rnn/first --to torch-export \
    --output digits.pt2
python launch/export.py runs/mnist_gan/first --to safetensors \
    --network generator --output generator.safetensors
"""

import sys

from nndist.cli.run_commands import export_command

if __name__ == "__main__":
    export_command(sys.argv[1:], __doc__ or "")
