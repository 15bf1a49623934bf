"""Sends a run to Weights & Biases as one clean run, built from its metrics.jsonl.

python launch/sync.py runs/mnist_cnn/first              # with an API key
python launch/sync.py runs/mnist_cnn/first --offline    # to be sent later

It is one W&B run, however often the training was interrupted. --offline
writes wandb/offline-run-... into the run's folder.
"""

import sys

from nndist.cli.commands import sync_command

if __name__ == "__main__":
    sync_command(sys.argv[1:], __doc__ or "")
