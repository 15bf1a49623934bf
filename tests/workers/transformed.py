"""A recipe whose dataset draws at random as users' do, by whatever generator; faults as in toy.py."""

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import transforms
from toy import Toy

from nndist.data import Data, Streamed

MODULES_OWN = random.Random(7)


class Jitter:
    """Brightness, contrast and noise, each by another generator."""

    def __init__(self):
        self.own = np.random.default_rng(7)

    def __call__(self, picture):
        brightness, contrast = random.uniform(-0.5, 0.5), np.random.uniform(0.5, 1.5)
        noise = torch.from_numpy(self.own.normal(0, 0.1, picture.shape)).float()
        return picture * contrast + brightness + noise + MODULES_OWN.gauss(0, 0.1)


class Photographs(torch.utils.data.Dataset):
    """As torchvision's ImageFolder: a picture by its number, through random transforms; a generator of its own."""

    def __init__(self, size=50):
        self.size = size
        self.transform = transforms.Compose(
            [transforms.RandomResizedCrop(4, antialias=True), transforms.RandomHorizontalFlip(), Jitter()]
        )
        self.generator = torch.Generator().manual_seed(7)

    def __len__(self):
        return self.size

    def __getitem__(self, number):
        picture = torch.sin(torch.arange(64.0) * (number + 1)).reshape(1, 8, 8)
        return self.transform(picture) + 0.1 * torch.randn(1, generator=self.generator), number % 3


@dataclass(kw_only=True)
class Transformed(Toy):
    """A classifier of pictures that no two epochs show alike, nor two evaluations by chance."""

    def data(self, config):
        return Data(Streamed(Photographs(), config.num_workers), Streamed(Photographs(20), config.num_workers))

    def networks(self):
        return {"model": nn.Sequential(nn.Flatten(), nn.Dropout(self.dropout), nn.Linear(16, 3))}

    def loss(self, networks, batch):
        self.suffer(networks)
        return F.cross_entropy(networks["model"](batch[0]), batch[1], reduction="none")
