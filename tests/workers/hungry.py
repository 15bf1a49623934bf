"""A recipe that asks the system for more memory than there can be, where a micro-batch is too large.

HUNGRY is "RANK EXAMPLES CALL": from the CALL-th loss of a training step that it computes, that rank finds no memory for
more than EXAMPLES at a time. The error is torch's own: 2**60 bytes are beyond any address space.
"""

import os
import threading
from dataclasses import dataclass

import torch
from torch import nn
from workers.toy import Toy

from nndist.data import Data, Resident

process = threading.local()  # what is counted there belongs to the process: a resumed run starts without it


@dataclass(kw_only=True)
class Hungry(Toy):
    """Fits sums of four numbers, in float64, so that rounding hides nothing."""

    epochs: int = 1
    batch_size: int = 22
    dropout: float = 0.0
    norm: bool = False
    two: bool = False
    """A second network whose loss is computed after the first one's update."""

    def data(self, config):
        x = torch.rand(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return Data(train=Resident(x, x.sum(1, keepdim=True)), test=Resident(x[:6], x[:6].sum(1, keepdim=True)))

    def networks(self):
        return {name: self.network() for name in ["model", *(["second"] * self.two)]}

    def network(self):
        layers = [nn.Linear(4, 8), *([nn.BatchNorm1d(8)] * self.norm), nn.Tanh(), nn.Dropout(self.dropout)]
        return nn.Sequential(*layers, nn.Linear(8, 1)).to(torch.float64)

    def objectives(self):
        return {"model": self.loss, **({"second": self.second_loss} if self.two else {})}

    def loss(self, networks, batch):
        answers = networks["model"](batch[0])
        if not self.two:
            self.eat(networks, batch)  # when a network's forward pass has left what is to be undone
        return (answers - batch[1]).square().squeeze(1)

    def second_loss(self, networks, batch):
        self.eat(networks, batch)
        return (networks["second"](batch[0]) - networks["model"](batch[0]) - batch[1]).square().squeeze(1)

    def eat(self, networks, batch):
        rank, examples, call = map(int, os.environ.get("HUNGRY", "-1 0 0").split())
        process.begun = getattr(process, "begun", 0) + networks["model"].training
        late = networks["model"].training and process.begun >= call
        if late and rank == int(os.environ.get("RANK", 0)) and len(batch[0]) > examples:
            torch.empty(1 << 60, dtype=torch.uint8)
