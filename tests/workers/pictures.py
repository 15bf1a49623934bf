"""A recipe that reads its examples through loader processes and augments them; faults as in toy.py."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from toy import Toy

from nndist.data import Data, Streamed


class Pictures(torch.utils.data.Dataset):
    """Example i is a pure function of i, as a picture in a folder is."""

    def __len__(self):
        return 50

    def __getitem__(self, number):
        picture = torch.sin(torch.arange(16.0) * (number + 1)).reshape(1, 4, 4)
        return picture, number % 3


@dataclass(kw_only=True)
class Augmented(Toy):
    """A classifier of augmented pictures."""

    def data(self, config):
        def augment(batch, randoms):
            pictures, labels = batch
            flipped = torch.where(randoms.uniform()[:, :, None, None] < 0.5, pictures.flip(3), pictures)
            return flipped + randoms.uniform(16).reshape(-1, 1, 4, 4), labels

        examples = Streamed(Pictures(), config.num_workers)
        return Data(train=examples, test=examples, augment=augment)

    def networks(self):
        return {"model": nn.Sequential(nn.Flatten(), nn.Dropout(self.dropout), nn.Linear(16, 3))}

    def loss(self, networks, batch):
        self.suffer(networks)
        return F.cross_entropy(networks["model"](batch[0]), batch[1], reduction="none")
