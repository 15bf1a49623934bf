"""Sends a run to Weights & Biases as one clean run, built from its metrics.jsonl, however often it was interrupted.

python launch/sync.py runs/mnist_cnn/first               # online, where an API key is configured
python launch/sync.py runs/mnist_cnn/first --offline     # writes wandb/offline-run-..., to be sent later
"""

import sys

from nndist.commands import sync_command

if __name__ == "__main__":
    sync_command(sys.argv[1:], __doc__ or "")
