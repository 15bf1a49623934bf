"""Called by test_score_sums in 1 and 3 processes: recipes whose scores depend on the batch, or on random numbers."""

import contextlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from toys import Line

import nndist
from nndist import Total, Weighted
from nndist.data.sets import Data, Resident
from nndist.errors import UserError


@dataclass(kw_only=True)
class Scored(Line):
    """Trained for a step; the first number of an example is its score."""

    epochs: int = 1
    batch_size: int = 100
    test_size: int = 20

    def data(self, config):
        x = torch.rand(100, 4, generator=torch.Generator().manual_seed(0))
        y = torch.arange(100)[:, None] // 7  # sorted by class, as folders of images are: 0 to 2 in the test set
        test = Resident(x[: self.test_size], y[: self.test_size])
        return Data(train=Resident(x, y), test=test)


class ByClass(Scored):
    """The mean over each class that a batch has."""

    def score(self, networks, batch):
        x, y = batch[0][:, 0], batch[1][:, 0]
        return {f"mean_{number}": Weighted(x, (y == number).float()) for number in y.unique().tolist()}


class TotalByClass(Scored):
    """The number of examples and the sum of each class that a batch has."""

    def score(self, networks, batch):
        x, y = batch[0][:, 0], batch[1][:, 0]
        of_class = {f"sum_{n}": Total(torch.stack([x[y == n].sum(), (y == n).sum()])) for n in y.unique().tolist()}
        return {"all": x, **of_class}

    def set_scores(self, means, totals):
        return {f"{name}_{place}": value for name, both in totals.items() for place, value in enumerate(both.tolist())}


class PlainByClass(Scored):
    """A score without weights that only the batches with an example of class 1 have."""

    def score(self, networks, batch):
        x, y = batch[0][:, 0], batch[1][:, 0]
        return {"all": x, **({"some": x} if bool((y == 1).any()) else {})}


class OutputByClass(Scored):
    """The same as an Output."""

    def score(self, networks, batch):
        x, y = batch[0][:, 0], batch[1][:, 0]
        return {"all": x, **({"some": nndist.Output(x)} if bool((y == 1).any()) else {})}


class TotalByShape(Scored):
    """A Total that is as long as the batch has classes."""

    def score(self, networks, batch):
        return {"all": batch[0][:, 0], "counts": Total(torch.bincount(batch[1][:, 0]))}


class Few(TotalByClass):
    """Fewer examples than processes."""

    test_size: int = 2


class AdaptingToOne(Scored):
    """The same where the last batch of each of three processes has one example."""

    test_size: int = 24

    def networks(self):
        return {"model": nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))}

    def score(self, networks, batch):
        networks["model"].train()
        return {"loss": self.loss(networks, batch)}


class OfBatch(Scored):
    """A figure of the batch, given to each of its examples; others that look alike are not."""

    def score(self, networks, batch):
        x, y = batch[0][:, 0], batch[1][:, 0]
        whole = {"f1": x.mean().expand(len(x)), "constant": torch.full_like(x, 0.3)}
        return {**whole, "each": x, "class_1": (y == 1).float(), "seldom": x.where(y == 1, x.mean())}


class Noisy(Scored):
    """Scores that are random numbers, one set and another; those of the set are, too."""

    def data(self, config):
        data = super().data(config)
        return Data(train=data.train, test=data.test, more={"train_set": data.train})

    def score(self, networks, batch):
        drawn = torch.rand(len(batch[0]))
        return {"noise": drawn, "drawn": nndist.Output(drawn)}

    def set_scores(self, means, totals):
        return {"bootstrap": torch.rand(1).item()}


class Adapting(Scored):
    """BatchNorm in training mode; of three processes one has two batches, the others have one."""

    test_size: int = 22

    def networks(self):
        shape = nn.Unflatten(1, (2, 2))
        return {"model": nn.Sequential(shape, nn.BatchNorm1d(2, affine=False), nn.Flatten(), nn.Linear(4, 1))}

    def score(self, networks, batch):
        networks["model"].train()
        norm, x = networks["model"][:2], batch[0]
        return {"norm": norm(x).flatten(1).square().mean(1), "loss": self.loss(networks, batch)}


class KeptByHand(Scored):
    """Two examples, and a metric that the recipe keeps and adds up over the processes, as torchmetrics does."""

    test_size: int = 2

    def __post_init__(self):
        self.sums = torch.zeros(2)

    def score(self, networks, batch):
        x = batch[0][:, 0]
        self.sums += torch.stack([x.sum(), torch.tensor(float(len(x)))])
        return {"x": x}

    def set_scores(self, means, totals):
        everyones = self.sums.clone()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(everyones)
        self.sums.zero_()
        return {"mean": (everyones[0] / everyones[1]).item()}


QUIET = {"progress": False, "figures": False, "report": False, "wandb": "off", "threads": 1, "timeout_seconds": 30}


def main(folder: str, *names: str) -> None:
    found, drawn = {}, {}
    for name in names:
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                kind = globals()[name]
                result = nndist.train(kind(), run=name, runs_dir=Path(folder), eval_batch_size=7, **QUIET)
            found[name] = result.scores
            if name == "Adapting":
                result.history.outputs = {"statistics": result.networks["model"][1].running_mean}
            drawn[name] = [values.tolist() for values in result.history.outputs.values()]
        except UserError as error:
            found[name] = str(error)
        notes = [line for line in said.getvalue().splitlines() if line.startswith("note")]
        found[name] = [found[name], notes, drawn.get(name)]
    (Path(folder) / f"scores-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))
