"""A recipe that reads shards by path or URL, small enough to be launched often; faults as in toy.py."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.nn.functional as F
from torch import nn
from toy import Toy

from nndist.data import Data
from nndist.data.shards import Sharded
from nndist.datasets.imagenet import decode, normalise


@dataclass(kw_only=True)
class OfShards(Toy):
    """A classifier of pictures in shards, with BatchNorm and dropout."""

    epochs: int = 2
    place: str = ""
    window: int = 3

    def data(self, config):
        def shards(name):
            cache = {"cache": Path(config.directory), "cache_bytes": config.cache_bytes}
            read = partial(decode, side=8)
            return Sharded(self.place, name, read, num_workers=config.num_workers, window=self.window, **cache)

        return Data(train=shards("train"), test=shards("val"), prepare=normalise)

    def networks(self):
        layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(self.dropout)]
        return {"model": nn.Sequential(*layers, nn.Linear(8 * 36, 3))}

    def loss(self, networks, batch):
        self.suffer(networks)
        return F.cross_entropy(networks["model"](batch[0]), batch[1], reduction="none")
