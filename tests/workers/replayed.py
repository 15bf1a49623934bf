"""A recipe whose steps are replayed when the system's limit on memory falls, below what a whole batch takes.

The limit is real: from the batch on that LIMIT (an environment variable) counts, the process may have 4.2 GB more than
it has. A step over 8 examples takes 4.8 GB, untouched, as what it asks for holds nothing. Blocks above 1 GB go back to
the system when they are freed: smaller ones would stay in the process's address space, which is what the limit counts.
"""

import os
import resource
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from workers.toy import Toy

from nndist.data import Data, Resident

BYTES = 600_000_000  # of an example


class Falling(Resident):
    """Lowers the limit when so many batches have been given."""

    given = 0

    def to(self, device):
        return self

    def batches(self, indices):
        for batch in super().batches(indices):
            self.given += 1
            if self.given == int(os.environ.get("LIMIT", 0)):
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + 4_200_000_000, -1))
            yield batch


@dataclass(kw_only=True)
class Replayed(Toy):
    """Fits sums of four numbers, in float64."""

    epochs: int = 1

    def data(self, config):
        x = torch.rand(160, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return Data(train=Falling(x, x.sum(1, keepdim=True)), test=Resident(x[:2], x[:2].sum(1, keepdim=True)))

    def networks(self):
        return {"model": nn.Linear(4, 1).double()}

    def loss(self, networks, batch):
        x, y = batch
        losses = (networks["model"](x) - y).square().squeeze(1)
        if not networks["model"].training:
            return losses
        room = torch.empty(len(x) * BYTES, dtype=torch.uint8)
        return losses + room[:0].sum()
