"""State that ordinary training code keeps in its own ways: after a stop it is there again, with the same bits."""

import json
import sys

import pytest
import torch
from launching import Processes
from safetensors.torch import load_file

import nndist
from nndist import Weighted
from nndist.distributed.runtime import Runtime
from nndist.errors import UserError
from nndist.recipe import load_recipe
from nndist.runs.python_state import PythonState
from nndist.runs.records import without_times

BASE = """
import collections
import copy
import functools
import torch
import torch.nn.functional as F
from typing import NamedTuple
from dataclasses import dataclass
from torch import nn
from nndist import Data, Recipe, Resident, Streamed, Weighted

class Counted(NamedTuple):
    calls: int
    factor: float

def scaled(factor, losses):
    return factor * losses

def points():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 8, generator=generator)
    return x, x[:, :4].sum(1, keepdim=True)

def mlp(width=16):
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 1))

@dataclass(kw_only=True)
class Base(Recipe):
    epochs: int = 3
    batch_size: int = 8
    lr: float = 0.05

    def data(self, config):
        x, y = points()
        return Data(train=Resident(x, y), test=Resident(x[:8], y[:8]))

    def networks(self):
        return {"model": mlp()}

    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr)

    def loss(self, networks, batch):
        return self.plain(networks, batch)

    def plain(self, networks, batch):
        x, y = batch
        return (networks["model"](x) - y).square().squeeze(1)
"""

CASES = {
    # what writes to `.data` or through NumPy, and more than a few thousand numbers of it
    "teacher": """
def networks(self):
    network = nn.Sequential(nn.Linear(8, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 1))
    self.teacher = copy.deepcopy(network)
    return {"model": network}
def loss(self, networks, batch):
    with torch.no_grad():
        target = self.teacher(batch[0])
    return self.plain(networks, batch) + (networks["model"](batch[0]) - target).square().squeeze(1)
def after_step(self, networks, step):
    for mine, theirs in zip(self.teacher.parameters(), networks["model"].parameters()):
        mine.data.mul_(0.8).add_(theirs.data, alpha=0.2)
""",
    "memory": """
def networks(self):
    self.memory = torch.zeros(2000, 8)
    return super().networks()
def loss(self, networks, batch):
    x, y = batch
    return self.plain(networks, batch) + (networks["model"](x + self.memory[:len(x)]) - y).square().squeeze(1)
def after_step(self, networks, step):
    self.memory.numpy()[:] += 0.01 * step
""",
    # the default `score` calls `loss`, and so counts, too
    "counted": """
def networks(self):
    self.calls, self.noise = 0, torch.Generator().manual_seed(3)
    return super().networks()
def loss(self, networks, batch):
    self.calls += 1
    noise = torch.randn(len(batch[0]), generator=self.noise)
    return min(1, self.calls / 20) * self.plain(networks, batch) * (1 + 0.1 * noise)
""",
    "function": """
def networks(self):
    self.criterion = F.mse_loss
    return super().networks()
def loss(self, networks, batch):
    return self.criterion(networks["model"](batch[0]), batch[1], reduction="none").squeeze(1)
def after_epoch(self, networks, epoch):
    if epoch == 1:
        self.criterion = F.l1_loss
""",
    "activation": """
def networks(self):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.act = nn.Linear(8, 16), nn.Linear(16, 1), torch.relu
        def forward(self, x):
            return self.last(self.act(self.first(x)))
    return {"model": Net()}
def after_epoch(self, networks, epoch):
    networks["model"].act = torch.tanh
""",
    "branch": """
def networks(self):
    network = nn.ModuleDict({"a": mlp(), "b": mlp()})
    self.active = network["a"]
    return {"model": network}
def loss(self, networks, batch):
    return (self.active(batch[0]) - batch[1]).square().squeeze(1)
def after_epoch(self, networks, epoch):
    if epoch == 1:
        self.active = networks["model"]["b"]
""",
    "method": """
def networks(self):
    self.now = self.warm
    return super().networks()
def warm(self, losses):
    return losses
def main(self, losses):
    return losses.clamp(max=0.5)
def loss(self, networks, batch):
    return self.now(self.plain(networks, batch))
def after_epoch(self, networks, epoch):
    self.now = self.main
""",
    "two_names": """
def networks(self):
    self.lowest, self.of_best, self.last = 1e9, None, None
    return super().networks()
def loss(self, networks, batch):
    losses, weight = self.plain(networks, batch), networks["model"][0].weight
    if self.last is not None:
        losses = losses + 0.1 * (weight - self.last).square().sum() + 0.1 * (weight - self.of_best).square().sum()
    return losses
def after_evaluation(self, networks, scores):
    self.last = networks["model"][0].weight.detach().clone()
    if scores["test/loss"] < self.lowest:
        self.lowest, self.of_best = scores["test/loss"], self.last
""",
    "by_parameter": """
def networks(self):
    network = mlp()
    self.shadow = {p: p.detach().clone() for p in network.parameters()}
    return {"model": network}
def loss(self, networks, batch):
    pull = sum((p - self.shadow[p]).square().sum() for p in networks["model"].parameters())
    return self.plain(networks, batch) + pull
def after_step(self, networks, step):
    for p in networks["model"].parameters():
        self.shadow[p].lerp_(p.detach(), 0.2)
""",
    "lookahead": """
schedule: str = "cosine"
def optimizer(self, name, network):
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner, self.count = inner, 0
            super().__init__(inner.param_groups, {})
            self.param_groups = inner.param_groups
            self.slow = [[p.detach().clone() for p in g["params"]] for g in self.param_groups]
        @torch.no_grad()
        def step(self, closure=None):
            self.inner.step()
            self.count += 1
            for group, slow in zip(self.param_groups, self.slow):
                for p, s in zip(group["params"], slow if self.count % 3 == 0 else ()):
                    p.copy_(s.lerp_(p, 0.5))
    return Lookahead(torch.optim.Adam(network.parameters(), lr=self.lr))
""",
    "inner_optimizer": """
def networks(self):
    class Counting(torch.optim.SGD):
        count = 0
        def step(self, closure=None):
            self.count += 1
            for group in self.param_groups:
                group["lr"] = 0.1 / self.count
            return super().step(closure)
    self.scale = nn.Parameter(torch.ones(()))
    self.of_scale = Counting([self.scale], lr=0.1)
    return super().networks()
def loss(self, networks, batch):
    return self.plain(networks, batch) * self.scale.detach()
def after_step(self, networks, step):
    self.scale.grad = torch.full((), 0.1)
    self.of_scale.step()
""",
    "package": """
def loss(self, networks, batch):
    from own_helpers.losses import penalty
    return self.plain(networks, batch) + penalty(networks["model"][0].weight)
""",
    "dataset": """
def data(self, config):
    class Noisier(torch.utils.data.Dataset):
        level = 0.0
        def __len__(self):
            return 48
        def __getitem__(self, number):
            x, y = points()
            return x[number] + self.level, y[number]
    self.training = Noisier()
    x, y = points()
    return Data(train=Streamed(self.training, 0), test=Resident(x[:8], y[:8]))
def after_epoch(self, networks, epoch):
    self.training.level = 0.3 * epoch
""",
    "parameter_attributes": """
def networks(self):
    network = mlp()
    for p in network.parameters():
        p.slow = p.detach().clone()
    return {"model": network}
def loss(self, networks, batch):
    return self.plain(networks, batch) + sum((p - p.slow).square().sum() for p in networks["model"].parameters())
def after_step(self, networks, step):
    for p in networks["model"].parameters():
        p.slow.lerp_(p.detach(), 0.2)
        p.calls = step
""",
    "subset": """
def data(self, config):
    class Noisier(torch.utils.data.Dataset):
        level = 0.0
        def __len__(self):
            return 52
        def __getitem__(self, number):
            x, y = points()
            return x[number % 48] + self.level, y[number % 48]
    training, _ = torch.utils.data.random_split(Noisier(), [48, 4], torch.Generator().manual_seed(1))
    self.training = training
    x, y = points()
    return Data(train=Streamed(training, 0), test=Resident(x[:8], y[:8]))
def after_epoch(self, networks, epoch):
    self.training.dataset.level = 0.3 * epoch
""",
    "batch_size": """
def after_epoch(self, networks, epoch):
    self.batch_size *= 2
    self.epochs = 2
""",
    "matrix_states": """
def optimizer(self, name, network):
    class Shampoo(torch.optim.Optimizer):
        def __init__(self, parameters, lr):
            super().__init__(parameters, {"lr": lr})
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    g, state = p.grad.view(len(p), -1), self.state[p]
                    left = state.setdefault("left", torch.eye(len(g)))
                    left.add_(g @ g.T, alpha=0.1)
                    p.sub_((torch.linalg.inv(left) @ g).view_as(p), alpha=group["lr"])
    return Shampoo(network.parameters(), self.lr)
""",
    "growing_buffer": """
def networks(self):
    network = mlp()
    network.register_buffer("bank", torch.zeros(0, 8))
    return {"model": network}
def loss(self, networks, batch):
    bank = networks["model"].bank
    return self.plain(networks, batch) + (bank.mean() if len(bank) else 0.0) * networks["model"][0].weight.sum()
def after_step(self, networks, step):
    networks["model"].bank = torch.cat([networks["model"].bank, torch.full((1, 8), 0.01 * step)])
""",
    "groups": """
def optimizer(self, name, network):
    class Own(torch.optim.SGD):
        def step(self, closure=None):
            (group,) = self.param_groups
            group["history"].append(len(group["history"]))
            group["scale"] += 0.01
            for p in group["params"]:
                p.grad *= 1 / (1 + len(group["history"])) * group["scale"].mean()
            return super().step(closure)
    made = Own(network.parameters(), lr=self.lr)
    made.param_groups[0] |= {"history": [], "scale": torch.ones(3)}
    return made
""",
    "order": """
def data(self, config):
    class Drawn(Resident):
        def order(self, seed, epoch, shuffle, batch_size):
            return torch.randint(0, 24, (48,), generator=torch.Generator().manual_seed(epoch))
    x, y = points()
    return Data(train=Drawn(x, y), test=Resident(x[:8], y[:8]))
""",
    # what stands for the weights or the data at the start, and later for something else, must not be written into them
    "weights_before": """
def networks(self):
    network = mlp()
    self.before, self.all_before = network[0].weight.data, [p.detach() for p in network.parameters()]
    return {"model": network}
def loss(self, networks, batch):
    pulls = [(p - q).square().sum() for p, q in zip(networks["model"].parameters(), self.all_before)]
    return self.plain(networks, batch) + sum(pulls) + (networks["model"][0].weight - self.before).square().sum()
def after_epoch(self, networks, epoch):
    self.before = networks["model"][0].weight.detach().clone()
    self.all_before = [p.detach().clone() for p in networks["model"].parameters()]
""",
    "soft_labels": """
def data(self, config):
    x, y = points()
    self.soft = y
    return Data(train=Resident(x, y, torch.arange(48)), test=Resident(x[:8], y[:8], torch.arange(8)))
def loss(self, networks, batch):
    x, y, numbers = batch
    return (networks["model"](x) - y - self.soft[numbers]).square().squeeze(1)
def after_step(self, networks, step):
    self.soft = 0.9 * self.soft
""",
    "tuples": """
def networks(self):
    network = mlp()
    self.state, self.pair, self.recent = Counted(0, 1.0), (network, 1.0), collections.deque(maxlen=4)
    return {"model": network}
def loss(self, networks, batch):
    losses = (self.pair[0](batch[0]) - batch[1]).square().squeeze(1)
    return losses * self.state.factor * self.pair[1] * (1 + 0.1 * len(self.recent))
def after_step(self, networks, step):
    self.state = Counted(self.state.calls + 1, self.state.factor * 0.99)
    self.recent.append(step)
    if step == 4:
        self.pair, self.recent = (networks["model"], 0.1), collections.deque(self.recent, maxlen=12)
""",
    "swapped": """
def networks(self):
    self.a, self.b = nn.Linear(8, 1), nn.Linear(8, 1)
    self.of_both = torch.optim.Adam([*self.a.parameters(), *self.b.parameters()], lr=0.05)
    return super().networks()
def loss(self, networks, batch):
    return (networks["model"](batch[0]) + self.a(batch[0]).detach() - batch[1]).square().squeeze(1)
def after_step(self, networks, step):
    x, y = points()
    (self.a(x) - y).square().mean().backward()
    self.of_both.step()
    self.of_both.zero_grad()
    if step % 4 == 0:
        self.a, self.b = self.b, self.a
""",
    "partial": """
def networks(self):
    self.scaled = functools.partial(scaled, 1.0)
    return super().networks()
def loss(self, networks, batch):
    return self.scaled(self.plain(networks, batch))
def after_step(self, networks, step):
    self.scaled = functools.partial(scaled, 1 / step)
""",
    "growing_list": """
def networks(self):
    network = nn.ModuleDict({"a": mlp(), "b": mlp()})
    self.active, self.seen = [], collections.defaultdict(int)
    return {"model": network}
def loss(self, networks, batch):
    used = [networks["model"]["a"], *self.active]
    return (sum(one(batch[0]) for one in used) - batch[1]).square().squeeze(1) * (1 + 0.01 * self.seen["steps"])
def after_step(self, networks, step):
    self.seen["steps"] += 1
    self.seen[f"of {step}"] += 1
    if step == 5:
        self.active.append(networks["model"]["b"])
""",
    "late_parameter": """
def networks(self):
    self.scale = None
    return super().networks()
def loss(self, networks, batch):
    return self.plain(networks, batch) * (1.0 if self.scale is None else self.scale)
def after_step(self, networks, step):
    if step == 4:
        self.scale = nn.Parameter(torch.ones(()))
    if self.scale is not None and self.scale.grad is not None:
        self.scale.data -= 0.01 * self.scale.grad
        self.scale.grad = None
""",
    "schedulers": """
def optimizer(self, name, network):
    made = torch.optim.SGD(network.parameters(), lr=self.lr)
    self.mine = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    steps = [torch.optim.lr_scheduler.ConstantLR(self.mine, 0.5, 4), torch.optim.lr_scheduler.StepLR(self.mine, 2, 0.9)]
    self.of_mine = torch.optim.lr_scheduler.SequentialLR(self.mine, steps, [4])
    return made
def loss(self, networks, batch):
    return self.plain(networks, batch) * self.mine.param_groups[0]["lr"]
def after_step(self, networks, step):
    self.mine.step()
    self.of_mine.step()
""",
    # what the recipe gave away and keeps no name of
    "given_away": """
def data(self, config):
    calls = {"prepare": 0}
    def prepare(batch):
        calls["prepare"] += 1
        return batch[0] * (1 + 0.01 * calls["prepare"]), batch[1]
    x, y = points()
    return Data(train=Resident(x, y), test=Resident(x[:8], y[:8]), prepare=prepare)
def objectives(self):
    calls = [0]
    def loss(networks, batch):
        calls[0] += 1
        return self.plain(networks, batch) * (1 + 0.1 * calls[0])
    return {"model": loss}
def score(self, networks, batch):
    return {"loss": self.plain(networks, batch)}
""",
    "vmap": """
def loss(self, networks, batch):
    return torch.func.vmap(lambda x: networks["model"](x))(batch[0]).sub(batch[1]).square().squeeze(1)
""",
}
QUIET = {"progress": False, "figures": False, "report": False, "wandb": "off", "threads": 1, "log_every": 1}


def written(folder, name):
    """The file of a recipe, beside a package of helpers."""
    path = folder / f"{name}.py"
    body = CASES[name]
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    (folder / "base_of_cases.py").write_text(BASE)
    path.write_text(f"from base_of_cases import *\n\n@dataclass(kw_only=True)\nclass R(Base):\n{lines}")
    (folder / "own_helpers").mkdir(exist_ok=True)
    (folder / "own_helpers/__init__.py").touch()
    (folder / "own_helpers/losses.py").write_text(
        "CALLS = 0\n\ndef penalty(weight):\n    global CALLS\n    CALLS += weight.requires_grad\n"
        "    return 0.001 * CALLS * weight.square().sum()\n"
    )
    return path


def bits(folder):
    (last,) = folder.glob("checkpoints/step-00000018")
    files = {path.name: load_file(path) for path in last.glob("*.safetensors")}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return files, [without_times(json.loads(line)) for line in lines]


@pytest.mark.parametrize("name", CASES)
def test_it_resumes_with_the_same_bits(name, tmp_path):
    """Each in processes of their own; stopped in mid-epoch, where an evaluation that does not count is made."""
    path = written(tmp_path, name)
    common = [path, "--runs-dir", tmp_path, "--no-progress", "--no-figures", "--no-report", "--wandb", "off"]
    common += ["--threads", 1, "--log-every", 1, "--data-source", "sample"]
    said = ""
    for flags in (["--run", "whole"], ["--run", "parts", "--max-steps", 10], ["--run", "parts"]):
        launched = Processes(1, [*common, *flags], folder=tmp_path)
        assert launched.wait() == [0], launched.said()
        said += launched.said()
    whole, parts = (bits(tmp_path / name / run) for run in ("whole", "parts"))
    assert whole[0].keys() == parts[0].keys()
    for file, tensors in whole[0].items():
        assert tensors.keys() == parts[0][file].keys()
        assert [key for key, tensor in tensors.items() if not torch.equal(tensor, parts[0][file][key])] == [], file
    assert whole[1] == parts[1]
    assert "without pickle" not in said and ("it stays 8" in said) == (name == "batch_size"), said


def test_an_order_of_its_own_is_the_one_that_is_taken(tmp_path):
    recipe = load_recipe(written(tmp_path, "order"))()
    data = recipe.data(None)
    moved = data.train.to(torch.device("cpu"))
    assert (
        torch.equal(moved.order(0, 5, True, 8), data.train.order(0, 5, True, 8))
        and int(moved.order(0, 5, True, 8).max()) < 24
    )


LOST = """
def networks(self):
    self.criterion = nn.MSELoss(reduction="none")
    return super().networks()
def loss(self, networks, batch):
    return self.criterion(networks["model"](batch[0]), batch[1]).squeeze(1)
def after_epoch(self, networks, epoch):
    self.criterion = nn.L1Loss(reduction="none")
"""


def test_an_object_of_another_class_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(CASES, "lost", LOST)
    nndist.train(written(tmp_path, "lost"), runs_dir=tmp_path, **QUIET)
    assert "recipe.criterion: changes in training and can't be saved without pickle" in capsys.readouterr().out


def test_what_initial_weights_sets_and_can_not_be_saved_is_named(tmp_path, monkeypatch, capsys):
    text = "def initial_weights(self, networks):\n    self.teacher = copy.deepcopy(networks['model'])\n"
    monkeypatch.setitem(CASES, "initial", text)
    nndist.train(written(tmp_path, "initial"), runs_dir=tmp_path, **QUIET)
    assert "recipe.teacher: changes in training and can't be saved" in capsys.readouterr().out


def test_weights_that_need_a_gradient_are_refused_in_one_line(tmp_path, monkeypatch):
    text = "def networks(self):\n    network = mlp()\n    network.gate = nn.Parameter(torch.zeros(()))\n"
    text += (
        "    return {'model': network}\ndef loss(self, networks, batch):\n    losses = self.plain(networks, batch)\n"
    )
    text += "    return Weighted(losses, torch.ones_like(losses) * networks['model'].gate.sigmoid())\n"
    monkeypatch.setitem(CASES, "gated", text)
    with pytest.raises(UserError, match="the weights of its Weighted losses need a gradient"):
        nndist.train(written(tmp_path, "gated"), runs_dir=tmp_path, **QUIET)


def test_a_hook_on_gradients_sees_those_of_the_weighted_mean(tmp_path):
    """On one process and in one batch, as a plain loop has them."""
    seen = []

    class Hooked(load_recipe(written(tmp_path, "order"))):
        def loss(self, networks, batch):
            x, y = batch
            out = networks["model"](x)
            if out.requires_grad:
                out.register_hook(seen.append)
            values = (out - y).square().squeeze(1)
            return Weighted(values, (x[:, 0] > 0).float() * 3)

    recipe = Hooked(batch_size=48)
    nndist.train(recipe, runs_dir=tmp_path, max_steps=1, **QUIET)
    data = recipe.data(None)
    Runtime(threads=1).seed(0)
    network = recipe.networks()["model"]
    (batch,) = data.train.batches([data.train.order(0, 0, True, 48)])
    out = network(batch[0])
    out.retain_grad()
    weights = (batch[0][:, 0] > 0).float() * 3
    (((out - batch[1]).square().squeeze(1) * weights).sum() / weights.sum()).backward()
    assert torch.equal(seen[0], out.grad)


def test_embeddings_that_change_as_they_are_read_are_refused_on_two_processes(tmp_path, monkeypatch):
    text = "def networks(self):\n    network = mlp()\n    network[1].table = nn.Embedding(4, 2, max_norm=1.0)\n"
    monkeypatch.setitem(CASES, "table", text + "    return {'model': network}\n")
    arguments = [
        written(tmp_path, "table"),
        "--runs-dir",
        tmp_path,
        "--no-progress",
        "--wandb",
        "off",
        "--max-steps",
        1,
    ]
    launched = Processes(2, arguments, folder=tmp_path)
    assert any(launched.wait())
    (line,) = [line for line in launched.said().splitlines() if line.startswith("error:")]
    assert "recipe table: model.1.table has max_norm" in line
    launched = Processes(1, arguments, folder=tmp_path)
    assert launched.wait() == [0], launched.said()


def test_a_marked_tensor_has_changed_however_it_was_written(tmp_path):
    class Holder:
        tensor = None

    holder = Holder()
    holder.tensor = torch.zeros(200, 200)
    state = PythonState(holder, {})
    assert state.changes() == ([], [])
    holder.tensor.data[3, 4] = 1.0
    assert [change.name for change in state.changes()[0]] == ["recipe.tensor"]


def test_a_position_past_the_end_of_an_epoch_that_became_shorter_is_the_next_epochs_start(tmp_path):
    path = written(tmp_path, "order")
    common = [path, "--runs-dir", tmp_path, "--run", "it", "--no-progress", "--wandb", "off", "--batch-size", 10]
    for flags in (["--max-steps", 4], ["--drop-last", "--allow-change", "drop_last"]):
        launched = Processes(1, [*common, *flags], folder=tmp_path)
        assert launched.wait(60) == [0], launched.said()
    about = json.loads((tmp_path / "order/it/run.json").read_text())
    assert about["status"] == "finished" and about["step"] == 4 + 2 * 4


def assert_noticed(path):
    """At the first save of two processes."""
    arguments = [path, "--runs-dir", path.parent, "--no-progress", "--wandb", "off", "--save-every", "5 steps"]
    launched = Processes(2, arguments, folder=path.parent)
    assert any(launched.wait())
    assert "process 1 has different weights or buffers from process 0 at step 5" in launched.said()


def test_own_parameters_that_processes_train_apart_are_noticed(tmp_path, monkeypatch):
    text = "def networks(self):\n    self.scale = nn.Parameter(torch.ones(()))\n    return super().networks()\n"
    text += "def loss(self, networks, batch):\n    return self.plain(networks, batch) * self.scale\n"
    text += "def after_step(self, networks, step):\n    self.scale.data -= 0.01 * self.scale.grad\n"
    text += "    self.scale.grad = None\n"
    monkeypatch.setitem(CASES, "apart", text)
    assert_noticed(written(tmp_path, "apart"))


def test_a_large_buffer_that_a_hook_writes_apart_is_noticed(tmp_path, monkeypatch):
    """Late, and through `.data`, which torch's version counter does not see."""
    text = "def networks(self):\n    network = mlp()\n    network.register_buffer('bank', torch.zeros(300, 400))\n"
    text += "    return {'model': network}\ndef loss(self, networks, batch):\n    self.seen = batch[0].sum()\n"
    text += "    return self.plain(networks, batch)\ndef after_step(self, networks, step):\n    if step >= 4:\n"
    text += "        networks['model'].bank.data.add_(self.seen)\n"
    monkeypatch.setitem(CASES, "bank", text)
    assert_noticed(written(tmp_path, "bank"))


def test_a_hook_that_is_removed_in_training_is_named(tmp_path, monkeypatch, capsys):
    text = "def networks(self):\n    network = mlp()\n"
    text += "    self.handle = network[0].register_forward_hook(lambda m, a, o: o * 0.5)\n"
    text += "    return {'model': network}\ndef after_epoch(self, networks, epoch):\n    self.handle.remove()\n"
    monkeypatch.setitem(CASES, "hooked", text)
    nndist.train(written(tmp_path, "hooked"), runs_dir=tmp_path, **QUIET)
    assert "networks['model'].0._forward_hooks: changes in training and can't be saved" in capsys.readouterr().out


def test_a_view_of_the_weights_that_training_stores_is_named(tmp_path, monkeypatch, capsys):
    """It would come back as a copy."""
    text = "def after_epoch(self, networks, epoch):\n    self.first = networks['model'][0].weight.data[:2]\n"
    monkeypatch.setitem(CASES, "view", text)
    nndist.train(written(tmp_path, "view"), runs_dir=tmp_path, **QUIET)
    assert "recipe.first: changes in training and can't be saved" in capsys.readouterr().out


def test_objects_that_were_swapped_are_put_in_and_out_in_the_process_that_swapped_them():
    """As for a test with the best weights: the state of a step, and then the present one again."""

    class Holder:
        def __init__(self):
            self.a, self.b = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)

    holder = Holder()
    first, second = holder.a, holder.b
    state = PythonState(holder, {})
    holder.a, holder.b = holder.b, holder.a
    swapped, lost = state.changes()
    assert state.restore(swapped) == [] == lost and (holder.a, holder.b) == (second, first)
    assert state.restore(swapped) == [] and (holder.a, holder.b) == (second, first)


def test_a_tensor_that_has_no_plain_bytes_is_no_error():
    class Holder:
        quantised = torch.quantize_per_tensor(torch.rand(200, 200), 0.1, 0, torch.quint8)
        nested = torch.nested.nested_tensor([torch.rand(2), torch.rand(3)])

    holder = Holder()
    holder.more = [Holder.quantised]
    assert PythonState(holder, {}).changes()[0] == []


def test_a_late_import_is_there_again_when_the_run_is_used(tmp_path, monkeypatch):
    path = written(tmp_path, "package")
    nndist.train(path, runs_dir=tmp_path, run="it", **QUIET)
    for name in [name for name in sys.modules if name.startswith("own_helpers")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = nndist.load_run(tmp_path / "package/it")
    found = run.evaluate().sets["test"].scores["loss"]
    assert found == pytest.approx(run.scores["test/loss"], rel=1e-6)
