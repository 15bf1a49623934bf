r"""Evaluates a run: every example once, on any number of processes.

python launch/evaluate.py runs/mnist_cnn/first
python launch/evaluate.py runs/mnist_cnn/first --data-source kmnist \
    --figure confusion.png
accelerate launch --config_file launch/accelerate/cpu_ddp.yaml \
    launch/evaluate.py runs/mnist_cnn/first --json

It uses the run's own test sets or a different data set, and prints what each
class was taken for.
"""

import sys

from nndist.cli.run_commands import evaluate_command

if __name__ == "__main__":
    evaluate_command(sys.argv[1:], __doc__ or "")
