"""--find-lr: what is measured, and that it leaves nothing else behind."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
from conftest import ROOT
from launching import Processes, command, succeeded
from torch import nn
from workers.toy import Toy

import nndist
from nndist.config import RunConfig
from nndist.data.sets import Data, Resident
from nndist.experiments.lr_finder import Curve, find_lr

TRAIN = ROOT / "launch/train.py"


@dataclass(kw_only=True)
class Bowl(Toy):
    """The mean square of weight - y, of curvature 2: plain gradient descent diverges above a learning rate of 1."""

    batch_size: int = 20
    momentum: float = 0.0

    def data(self, config):
        x = torch.ones(100, 1)
        y = x + 0.3 * torch.randn(100, 1, generator=torch.Generator().manual_seed(0))
        return Data(train=Resident(x, y), test=Resident(x[:10], y[:10]))

    def networks(self):
        return {"model": nn.Linear(1, 1, bias=False)}

    def loss(self, networks, batch):
        x, y = batch
        return (networks["model"](x) - y).square().squeeze(1)


def test_the_range_test_ends_where_theory_says_that_steps_diverge(tmp_path, capsys):
    torch.manual_seed(0)
    find_lr(Bowl(), RunConfig(runs_dir=tmp_path, threads=1, progress=False))
    (curve,) = json.loads((tmp_path / "test_lr_finder/find-lr/find-lr.json").read_text())["curves"]
    assert 1.0 < curve["lr"][-1] < 10.0 and curve["lr"][0] == pytest.approx(1e-6)
    ratios = [b / a for a, b in zip(curve["lr"], curve["lr"][1:], strict=False)]
    assert min(ratios) == pytest.approx(max(ratios)), "the learning rate grows geometrically"
    assert 0.003 < curve["steepest"] < 1.0
    said = capsys.readouterr().out
    assert f"--lr {curve['steepest']:.1g}" in said and "the loss diverges" in said
    assert max(len(line) for line in said.splitlines() if str(tmp_path) not in line and line[:6] != "recipe") <= 80
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"find-lr.png", "find-lr.json"}


def test_what_it_suggests_trains_better_than_a_hundredth_of_it(tmp_path, capsys):
    find_lr(nndist.recipe.loading.load_recipe(ROOT / "recipes/sum_mlp.py")(), RunConfig(runs_dir=tmp_path, threads=1))
    (curve,) = json.loads((tmp_path / "sum_mlp/find-lr/find-lr.json").read_text())["curves"]
    losses = []
    for lr in (curve["steepest"], curve["steepest"] / 100):
        settings = {"progress": False, "figures": False, "report": False, "threads": 1, "runs_dir": tmp_path}
        result = nndist.train(ROOT / "recipes/sum_mlp.py", lr=lr, max_steps=300, steps=300, **settings)
        losses.append(result.scores["test/loss"])
    assert losses[0] < losses[1] / 3


def test_suggestions_of_known_curves():
    lrs = [1e-6 * 10 ** (7 * n / 199) for n in range(200)]
    falling = Curve("model", lrs, [1 / (1 + math.exp(5 * (math.log10(lr) + 3))) + lr for lr in lrs])
    steepest, tenth = falling.suggestions()
    assert 5e-4 < steepest < 1e-2 and 1e-3 < tenth < 3e-2
    assert Curve("model", lrs, [1.0 + lr for lr in lrs]).suggestions() is None
    assert Curve("model", lrs[:3], [1.0] * 3).suggestions() is None


def test_every_network_has_its_own_curve(tmp_path):
    done = succeeded(
        command(TRAIN, ROOT / "recipes/optimizers.py", "--find-lr", "--max-steps", "80", "--threads", "1", cwd=tmp_path)
    )
    assert "of adadelta" in done.stdout and "of sgd" in done.stdout
    curves = json.loads((tmp_path / "runs/optimizers/find-lr/find-lr.json").read_text())["curves"]
    own = {curve["objective"]: curve["own_lr"] for curve in curves}
    first = {curve["objective"]: curve["lr"][0] for curve in curves}
    assert first["adadelta"] / first["sgd"] == pytest.approx(own["adadelta"] / own["sgd"]) == pytest.approx(100)


@pytest.mark.long
def test_two_processes_find_what_one_finds(tmp_path):
    for world_size in (1, 2):
        flags = ["--find-lr", "--threads", 1, "--runs-dir", tmp_path / f"runs{world_size}"]
        launched = Processes(world_size, [ROOT / "recipes/sum_mlp.py", *flags], folder=tmp_path)
        assert not any(launched.wait()) and launched.said().count("try      --lr") == 1, launched.said()
    one, two = (
        json.loads((tmp_path / f"runs{n}/sum_mlp/find-lr/find-lr.json").read_text())["curves"][0] for n in (1, 2)
    )
    assert two["loss"][:100] == pytest.approx(one["loss"][:100], rel=1e-3)
