"""Run by test_elastic: a recipe whose processes write down the examples of each step, in $SEEN; in float64."""

import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from nndist.data import Data, Resident
from nndist.recipe import Recipe

process = threading.local()  # what is there belongs to the process: no checkpoint holds it


@dataclass(kw_only=True)
class Seen(Recipe):
    """Numbers that name themselves, a slow step, and momentum, so that any difference stays."""

    epochs: int = 40
    batch_size: int = 13
    lr: float = 0.02
    evaluate_every: str = "5 epochs"
    seconds: float = 0.05
    """Of each step."""

    def data(self, config):
        x = torch.rand(101, 5, generator=torch.Generator().manual_seed(0)).double()
        return Data(train=Resident(torch.arange(101), x), test=Resident(torch.arange(101), x))

    def networks(self):
        layers = [nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 5)]
        return {"model": nn.Sequential(*layers).double()}

    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr, momentum=0.9)

    def loss(self, networks, batch):
        numbers, x = batch
        if networks["model"].training:
            process.numbers = numbers.tolist()
        return F.mse_loss(networks["model"](x), x.flip(1), reduction="none")

    def after_step(self, networks, step):
        time.sleep(self.seconds)
        rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        line = {"step": step, "rank": rank, "processes": size, "numbers": process.numbers}
        with Path(os.environ["SEEN"]).open("a") as file:  # one write, so that processes don't mix theirs
            file.write(json.dumps(line) + "\n")
