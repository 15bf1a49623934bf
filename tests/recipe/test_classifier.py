"""What `Classifier` makes of labels that don't count."""

import csv
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nndist
from nndist import Classifier, Data, Resident
from nndist.errors import UserError
from nndist.trained.loaded_run import load_run

QUIET = {"progress": False, "report": False, "threads": 1, "wandb": "off", "run": "it", "figures": False}


@dataclass(kw_only=True)
class Labelled(Classifier):
    """Three classes; a third of the labels are -100, in training and test sets."""

    epochs: int = 2
    batch_size: int = 8
    lr: float = 0.5
    class_scores = True

    def data(self, config):
        x = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
        y = x[:, :3].argmax(1)
        y[::3] = -100
        return Data(train=Resident(x[:40], y[:40]), test=Resident(x[40:], y[40:]), classes=("a", "b", "c"))

    def networks(self):
        network = nn.Linear(4, 3)
        nn.init.zeros_(network.weight)
        nn.init.zeros_(network.bias)
        return {"model": network}

    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr)


class Ignoring(Labelled):
    ignore_index = -100


class IgnoringWeighed(Ignoring):
    loss_weights = (1.0, 5.0, 2.0)


@pytest.mark.parametrize("kind", [Ignoring, IgnoringWeighed])
def test_labels_that_are_ignored_count_in_nothing(tmp_path, capsys, kind):
    result = nndist.train(kind(shuffle=False), runs_dir=tmp_path, accumulate=2, **{**QUIET, "figures": True})
    assert "its cross-entropy" not in capsys.readouterr().out
    by_hand = kind()
    model, data = by_hand.networks()["model"], by_hand.data(None)
    weight = None if kind.loss_weights is None else torch.tensor(kind.loss_weights)
    for _ in range(kind.epochs):
        for x, y in zip(*(tensor.split(8) for tensor in data.train.tensors), strict=True):
            model.zero_grad()
            F.cross_entropy(model(x), y, weight).backward()
            for parameter in model.parameters():
                parameter.data -= 0.5 * parameter.grad
    x, y = data.test.tensors
    logits, counts = model(x), y != -100
    right = (logits.argmax(1) == y)[counts].float().mean().item()
    assert result.scores["test/loss"] == pytest.approx(F.cross_entropy(logits, y).item(), abs=1e-5)
    assert result.scores["test/accuracy"] == pytest.approx(right) and result.scores["test/macro_f1"] > 0
    evaluated = load_run(result.folder).evaluate(threads=1).sets["test"]
    assert evaluated.scores["accuracy"] == pytest.approx(right) and int(evaluated.confusion.sum()) == int(counts.sum())
    rows = [*csv.DictReader((result.folder / "figures/by_class.csv").open())]
    assert {row["class"]: int(row["examples"]) for row in rows} == {
        name: int((y == number).sum()) for number, name in enumerate(data.classes)
    }
    listed = [*csv.DictReader((result.folder / "figures/prediction_list.csv").open())]
    assert {int(row["test example"]) for row in listed} == set(counts.nonzero().flatten().tolist())


@pytest.mark.parametrize("where", ["class_scores", "loss_weights"])
def test_labels_of_no_class_are_refused_with_the_remedy(tmp_path, where):
    class Refused(Labelled):
        class_scores = where == "class_scores"
        loss_weights = [1.0] * 120 if where == "loss_weights" else None

    with pytest.raises(UserError, match=r"a label is -100, none of the .* classes; .*write ignore_index = -100"):
        nndist.train(Refused(), runs_dir=tmp_path, **QUIET)


def test_the_note_on_labels_that_are_ignored_names_ignore_index(tmp_path, capsys):
    class Plain(Labelled):
        class_scores = False

    result = nndist.train(Plain(), runs_dir=tmp_path, **{**QUIET, "figures": True})
    said = capsys.readouterr().out
    assert said.count("its cross-entropy") == 1 and "failed" not in said
    assert "for torch's mean write ignore_index = -100 in the recipe's class" in said
    assert (result.folder / "figures/by_class.csv").is_file()
