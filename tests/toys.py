"""Small recipes that tests train: every field of the contract, nothing that takes time."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from workers.toy import Toy

from nndist.data.sets import Data, Resident


@dataclass(kw_only=True)
class Line(Toy):
    """A small network fitted to 100 points."""

    batch_size: int = 16
    dropout: float = 0.0

    def data(self, config):
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(100, 4, generator=generator)
        return Data(train=Resident(x, x.sum(1, keepdim=True)), test=Resident(x[:30], x[:30].sum(1, keepdim=True)))

    def networks(self):
        return {"model": nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(self.dropout), nn.Linear(8, 1))}

    def loss(self, networks, batch):
        x, y = batch
        return F.mse_loss(networks["model"](x), y, reduction="none").squeeze(1)
