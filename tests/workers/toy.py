"""What the small recipes of the tests share; those that are launched take faults from the environment.

FAULT is "RANK CALL kill": that rank is sent SIGKILL in the CALL-th loss of a training step that it computes.
"""

import os
import signal
import threading
from dataclasses import dataclass

import torch

from nndist.recipe import Recipe

process = threading.local()  # what is counted there belongs to the process: a resumed run starts without it


@dataclass(kw_only=True)
class Toy(Recipe):
    """Trained by SGD with momentum."""

    epochs: int = 3
    batch_size: int = 8
    lr: float = 0.05
    momentum: float = 0.9
    dropout: float = 0.2

    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr, momentum=self.momentum)

    def suffer(self, networks):
        """Counts a loss and does what FAULT says."""
        process.calls = getattr(process, "calls", 0) + 1
        fault = f"{os.environ.get('RANK', 0)} {process.calls} kill"
        if networks["model"].training and os.environ.get("FAULT", "") == fault:
            os.kill(os.getpid(), signal.SIGKILL)
