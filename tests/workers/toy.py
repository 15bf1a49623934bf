"""What the small recipes of the tests share; those that are launched take faults from the environment.

FAULT is "RANK CALL kill": that rank is sent SIGKILL in the CALL-th loss of a training step that it computes.
"""

import os
import signal
from dataclasses import dataclass
from typing import ClassVar

import torch

from nndist.recipe import Recipe


@dataclass(kw_only=True)
class Toy(Recipe):
    """Trained by SGD with momentum."""

    epochs: int = 3
    batch_size: int = 8
    lr: float = 0.05
    momentum: float = 0.9
    dropout: float = 0.2

    calls: ClassVar[int] = 0

    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr, momentum=self.momentum)

    def suffer(self, networks):
        """Counts a loss and does what FAULT says."""
        type(self).calls += 1
        fault = f"{os.environ.get('RANK', 0)} {type(self).calls} kill"
        if networks["model"].training and os.environ.get("FAULT", "") == fault:
            os.kill(os.getpid(), signal.SIGKILL)
