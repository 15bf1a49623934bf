"""A recipe that reads shards by path or URL, small enough to be launched often; faults as in pictures.py."""

import os
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from nndist.data import Data
from nndist.datasets.imagenet import decode, normalise
from nndist.recipe import Recipe
from nndist.shards import Sharded


@dataclass(kw_only=True)
class OfShards(Recipe):
    """A classifier of pictures in shards, with BatchNorm and dropout."""

    epochs: int = 2
    batch_size: int = 8
    lr: float = 0.05
    dropout: float = 0.2
    place: str = ""
    window: int = 3

    calls: ClassVar[int] = 0

    def data(self, config):
        def shards(name):
            cache = {"cache": Path(config.directory), "cache_bytes": config.cache_bytes}
            read = partial(decode, side=8)
            return Sharded(self.place, name, read, num_workers=config.num_workers, window=self.window, **cache)

        return Data(train=shards("train"), test=shards("val"), prepare=normalise)

    def networks(self):
        layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(self.dropout)]
        return {"model": nn.Sequential(*layers, nn.Linear(8 * 36, 3))}

    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr, momentum=0.9)

    def loss(self, networks, batch):
        type(self).calls += 1
        fault = f"{os.environ.get('RANK', 0)} {type(self).calls} kill"
        if networks["model"].training and os.environ.get("FAULT", "") == fault:
            os.kill(os.getpid(), signal.SIGKILL)
        return F.cross_entropy(networks["model"](batch[0]), batch[1], reduction="none")
