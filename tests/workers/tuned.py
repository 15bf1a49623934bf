"""A small recipe with BatchNorm that is fine-tuned by test_fine_tuning, in 1 and 3 processes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import nndist
from nndist import Classifier, Data, Resident


@dataclass(kw_only=True)
class Tuned(Classifier):
    """Which of four numbers is the largest."""

    epochs: int = 4
    batch_size: int = 30
    lr: float = 0.05
    classes_of_it: int = 4
    weight_decay: float = 0.1

    def data(self, config):
        x = torch.randn(240, 4, generator=torch.Generator().manual_seed(0)).double()
        y = x.argmax(1) % self.classes_of_it
        return Data(Resident(x[:180], y[:180]), Resident(x[180:], y[180:]))

    def networks(self):
        body = nn.Sequential(nn.Linear(4, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU())
        return {"model": nn.Sequential(body, nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, self.classes_of_it)).double()}

    def optimizer(self, name, network):
        return torch.optim.AdamW(network.parameters(), lr=self.lr, weight_decay=self.weight_decay)


QUIET = {"progress": False, "figures": False, "report": False, "threads": 1, "wandb": "off", "timeout_seconds": 60}


def train(folder, run, fields=None, **settings):
    return nndist.train(Tuned(**(fields or {})), run=run, runs_dir=folder, **QUIET, **settings)


def main(folder: str, start: str) -> None:
    """Fine-tunes by each way of summing gradients, twice stopped."""
    fields = {"init_from": start, "freeze": ("0",), "lr_scale": ("1.*=0.1",), "ema_decay": 0.9}
    train(folder, "frozen-ddp", fields, gradient_sync="ddp")
    for steps in (5, 13, 24):
        train(folder, "thawed", {**fields, "unfreeze_at": "2 epochs"}, max_steps=steps)


def plain(start: dict[str, torch.Tensor], *, thaw: int) -> nn.Module:
    """What torch makes of the same: the first part frozen until step `thaw`, in evaluation mode as long."""
    from nndist.data import permutation

    recipe = Tuned()
    (x, y), network = recipe.data(None).train.tensors, recipe.networks()["model"]
    network.load_state_dict(start)
    body, slow, head = network[0], network[1], network[3]
    groups = [{"params": [*body.parameters(), *head.parameters()]}, {"params": slow.parameters(), "lr": recipe.lr / 10}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)
    step = 0
    for epoch in range(recipe.epochs):
        for index in permutation(180, 0, epoch).split(30):
            network.train()
            body.requires_grad_(step >= thaw)
            body.train(step >= thaw)
            optimizer.zero_grad()
            F.cross_entropy(network(x[index]), y[index]).backward()
            optimizer.step()
            step += 1
    return network.eval()
