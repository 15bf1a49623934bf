"""A recipe that leaves every kind of file in its run's folder."""

from dataclasses import dataclass

import torch
from toys import Line

from nndist.figures import Table


@dataclass(kw_only=True)
class Keeping(Line):
    """A small network with an average, a best score, snapshots, a table and a text."""

    ema_decay: float | None = 0.9
    best: str | None = "test/loss"
    best_is: str = "lowest"

    def score(self, networks, batch):
        loss = self.loss(networks, batch)
        return {"loss": loss, "distance": loss.sqrt()}

    def snapshot(self, networks, data):
        return {"answers": networks["model"](torch.full((3, 4), 0.5))}

    def figures(self, networks, data, history):
        steps, values = history.series("test/loss")
        rows = list(zip(map(str, steps), map(str, values), strict=True))
        return {"scores": Table(["step", "loss"], rows), "remark": f"{len(steps)} evaluations"}
