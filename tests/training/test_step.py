"""The step is that of a loop written by hand, to the bit: for every shipped recipe, and whatever its Python does."""

import random
from dataclasses import dataclass

import pytest
import torch
from conftest import RECIPES
from launching import ROOT, Processes
from making import FEWER, make
from safetensors.torch import load_file
from torch import nn
from toys import Line

import nndist
import nndist.training.trainer
from nndist.config import RunConfig
from nndist.data.sets import Data, ExampleRandom, Resident
from nndist.distributed.runtime import Runtime
from nndist.metrics import Weighted
from nndist.training.optimizers import needs_closure

QUIET = ["--wandb", "off", "--no-figures", "--no-report", "--no-progress", "--threads", 1]


@pytest.fixture
def train(tmp_path):
    """nndist.train into a folder of the test, quietly."""

    def call(recipe, **settings):
        made = {"runs_dir": tmp_path, "run": "it", "progress": False, "figures": False, "threads": 1}
        return nndist.train(recipe, wandb="off", report=False, **{**made, **settings})

    return call


def plain_loop(recipe, num_steps, seed=0):
    """The first steps in plain PyTorch; gives the trained networks.

    The mean of the losses, backward, clipping, update: of each objective in turn, in the order of nndist's examples.
    """
    runtime = Runtime(threads=1)
    data = recipe.data(RunConfig(data_source="sample").data_config(download=False))
    runtime.seed(seed)
    networks = recipe.networks()
    if recipe.channels_last:
        networks = {name: network.to(memory_format=torch.channels_last) for name, network in networks.items()}
    optimizers = {name: recipe.optimizer(name, network) for name, network in networks.items()}
    rates = {name: [group["lr"] for group in optimizer.param_groups] for name, optimizer in optimizers.items()}
    runtime.seed(seed, rank=0)
    batches = [
        (epoch, numbers)
        for epoch in range(recipe.epochs)
        for numbers in data.train.order(seed, epoch, recipe.shuffle, recipe.batch_size).split(recipe.batch_size)
    ]
    for step, (epoch, numbers) in enumerate(batches[:num_steps]):
        (raw,) = data.train.in_epoch(seed, epoch).batches([numbers])
        batch = data.prepare(raw)
        if data.augment is not None:
            batch = data.augment(batch, ExampleRandom(seed, epoch, numbers))
        for name, objective in recipe.objectives().items():
            for group, lr in zip(optimizers[name].param_groups, rates[name], strict=True):
                group["lr"] = lr * recipe.lr_factor(step, len(batches))
            if needs_closure(optimizers[name]):

                def closure(name=name, objective=objective, batch=batch):
                    optimizers[name].zero_grad()
                    loss = objective(networks, batch).mean()
                    loss.backward()
                    return loss

                optimizers[name].step(closure)
                continue
            losses = objective(networks, batch)
            optimizers[name].zero_grad()
            if isinstance(losses, Weighted):
                counted = losses.weights > 0
                ((losses.values * losses.weights)[counted].sum() / losses.weights.sum()).backward()
            else:
                losses.mean().backward()
            if recipe.clip_norm is not None:
                nn.utils.clip_grad_norm_(networks[name].parameters(), recipe.clip_norm)
            optimizers[name].step()
    return networks


def tensors_of(networks):
    return {f"{name}.{key}": t for name, network in networks.items() for key, t in network.state_dict().items()}


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def saved(result):
    """Every tensor of the newest checkpoint."""
    (folder,) = result.folder.glob(f"checkpoints/step-{result.steps:08d}")
    return {f"{path.stem}/{n}": t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


@pytest.mark.parametrize("name", [path.stem for path in RECIPES])
def test_the_first_steps_of_every_recipe_are_those_of_a_plain_loop(train, name, monkeypatch, quick_reader):
    monkeypatch.setattr(nndist.training.trainer.Trainer, "evaluate", lambda trainer, **_: trainer.log())
    recipe = make(name, **{**FEWER.get(name, {}), "batch_size": 8, "evaluate_every": "100 steps"})
    ours = train(recipe, data_source="sample", max_steps=6, log_every=1).networks
    theirs = plain_loop(recipe, 6)
    assert_same_bits(tensors_of(ours), tensors_of(theirs))


@dataclass(kw_only=True)
class Everything(Line):
    """Dropout, BatchNorm, clipping, momentum, tied weights, an unused parameter, and weights of the losses."""

    dropout: float = 0.3
    clip_norm: float | None = 0.5
    ema_decay: float | None = 0.9

    def networks(self):
        torch.manual_seed(5)
        network = nn.Sequential(
            *(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(self.dropout), nn.Linear(8, 8), nn.Tanh()),
            *(nn.Linear(8, 8), nn.Linear(8, 1)),
        )
        network[6].weight = network[4].weight
        network.unused = nn.Parameter(torch.ones(3))
        return {"model": network}

    def loss(self, networks, batch):
        losses = super().loss(networks, batch)
        return Weighted(losses, (batch[0][:, 0] > 0.2).float())

    def score(self, networks, batch):
        return {"loss": super().loss(networks, batch)}


def test_everything_together_is_the_plain_loop(train):
    recipe = Everything(epochs=5)
    ours, theirs = tensors_of(train(recipe).networks), tensors_of(plain_loop(recipe, 35))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert ours["model.unused"].eq(1).all()


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"precision": "bf16"}], ids=str)
def test_a_resumed_run_goes_on_with_the_same_bits(train, settings):
    recipe = Everything(epochs=10)
    whole = train(recipe, run="whole", **settings)
    train(recipe, run="halves", max_steps=31, **settings)
    assert_same_bits(saved(train(recipe, run="halves", **settings)), saved(whole))


# What a network's Python may do.


class Counting(nn.Module):
    """Another factor in each forward pass, which no tensor holds."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        return x * (1 + 0.01 * self.calls)


class CountsInItsClass(nn.Module):
    """Counts in an attribute of its class."""

    calls = 0

    def forward(self, x):
        type(self).calls += self.training
        return x * (1 + 0.01 * (type(self).calls % 7))


COUNTED = {"calls": 0}


class CountsElsewhere(nn.Module):
    """Changes after some steps, by a value that neither network nor recipe holds."""

    def forward(self, x):
        COUNTED["calls"] += self.training
        return x * (2 if COUNTED["calls"] > 6 else 1)


class Chance(nn.Module):
    """Skips itself at random, by Python's random numbers, in training."""

    def forward(self, x):
        return -x if self.training and random.random() < 0.5 else x


class Looks(nn.Module):
    """Looks at a value, and at all of them as an array."""

    def forward(self, x):
        return x if x.sum().item() + x.detach().numpy().sum() > 0 else 2 * x


class Selects(nn.Module):
    """Gives as many numbers as are positive, then as many again as there were."""

    def forward(self, x):
        return x + x[x > 0].sum()


class Hooked(nn.Identity):
    """Has hooks."""

    def __init__(self):
        super().__init__()
        self.register_forward_hook(lambda module, inputs, output: output * 2)
        self.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] / 3,))


class Rebinds(nn.Module):
    """A running mean that is another tensor after each step."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


@pytest.mark.parametrize(
    "module", [Counting, CountsInItsClass, CountsElsewhere, Chance, Looks, Selects, Hooked, Rebinds]
)
def test_whatever_a_networks_python_does_it_does_in_each_step(train, module):
    @dataclass(kw_only=True)
    class Odd(Line):
        """A network with a module of its own."""

        def networks(self):
            CountsInItsClass.calls = COUNTED["calls"] = 0
            return {"model": nn.Sequential(nn.Linear(4, 8), nn.ReLU(), module(), nn.Linear(8, 1))}

    assert_same_bits(tensors_of(train(Odd()).networks), tensors_of(plain_loop(Odd(), 21)))


class Mean(nn.Module):
    """The mean of however many numbers, scaled."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x.mean(1, keepdim=True) * self.scale


def test_batches_of_many_shapes(train):
    @dataclass(kw_only=True)
    class Lengths(Line):
        """Each batch is cut to a length of its own."""

        def data(self, config):
            x = torch.rand(400, 40, generator=torch.Generator().manual_seed(0))
            lengths = 1 + torch.arange(400) // 10

            def prepare(batch):
                return batch[0][:, : int(batch[1].max())], batch[0].sum(1, keepdim=True)

            return Data(Resident(x, lengths), Resident(x[:8], lengths[:8]), prepare=prepare)

        def networks(self):
            return {"model": Mean()}

    recipe = Lengths(epochs=4, batch_size=10, shuffle=False, lr=1e-3)
    assert_same_bits(tensors_of(train(recipe).networks), tensors_of(plain_loop(recipe, 160)))


# Several processes.


def launched(folder, recipe, run, steps, *flags, world_size=3):
    """Trains so far, and gives the tensors of the checkpoint and what was said."""
    flags = [*QUIET, "--runs-dir", folder, "--run", run, "--max-steps", steps, *flags]
    processes = Processes(world_size, [recipe, *flags], folder=folder)
    assert processes.wait() == [0] * world_size, processes.said()
    (path,) = (folder / recipe.stem / run / "checkpoints").glob(f"step-{steps:08d}")
    found = {f"{p.stem}/{n}": t for p in path.glob("*.safetensors") for n, t in load_file(p).items()}
    return found, processes.said()


def test_three_processes_resume_with_the_same_bits(tmp_path):
    """By default they add gradients up in shared memory, once per step; DDP's weights are the same up to rounding."""
    recipe, flags = ROOT / "recipes/sum_mlp.py", ("--clip-norm", 1.0)
    whole, said = launched(tmp_path, recipe, "whole", 40, *flags)
    assert "gradients summed once per step, via shared memory\n" in said
    launched(tmp_path, recipe, "halves", 17, *flags)
    assert_same_bits(launched(tmp_path, recipe, "halves", 40, *flags)[0], whole)
    ddp, said = launched(tmp_path, recipe, "ddp", 40, *flags, "--gradient-sync", "ddp")
    assert "gradients averaged by DDP during the backward pass\n" in said
    weights = [name for name in ddp if name.startswith("model/")]
    assert weights
    for name in weights:
        torch.testing.assert_close(whole[name], ddp[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient_sync", ["step", "ddp"])
def test_gradients_that_are_sent_in_bf16(tmp_path, gradient_sync):
    """They are rounded, alike on all processes: the weights differ a little from those of fp32, and are all finite."""
    recipe, flags = ROOT / "recipes/sum_mlp.py", ("--gradient-sync", gradient_sync)
    exact, _ = launched(tmp_path, recipe, "exact", 20, *flags, world_size=2)
    rounded, _ = launched(tmp_path, recipe, "rounded", 20, *flags, "--gradient-compression", "bf16", world_size=2)
    weights = [name for name in exact if name.startswith("model/")]
    assert any(not torch.equal(rounded[name], exact[name]) for name in weights)
    for name in weights:
        torch.testing.assert_close(rounded[name], exact[name], rtol=0.05, atol=2e-3)


ODD = '''
from dataclasses import dataclass
import torch
from torch import nn
from toys import Line


class Network(nn.Module):
    """With a running mean of its own."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 1).double()
        self.register_buffer("mean", torch.zeros(4).double())
        self.unused = nn.Parameter(torch.ones(2).double())

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.body(x - self.mean.detach())


@dataclass(kw_only=True)
class Odd(Line):
    """Sums of four numbers."""

    freeze: bool = False

    def networks(self):
        network = Network()
        if self.freeze:
            network.unused = None
        return {"model": network}

    def loss(self, networks, batch):
        return super().loss(networks, [tensor.double() for tensor in batch])

    def after_step(self, networks, step):
        networks["model"].body.bias.requires_grad_(not self.freeze or step % 3 == 0)
'''


@pytest.fixture
def odd(tmp_path):
    path = tmp_path / "odd.py"
    path.write_text(f"import sys\nsys.path.append({str(ROOT / 'tests')!r})\n" + ODD)
    return path


def test_buffers_that_the_recipe_changes_are_the_same_on_all_processes(tmp_path, odd):
    """Each process subtracts the mean of its own part: what they keep is the mean over all, and a line says so."""
    alone, said = launched(tmp_path, odd, "alone", 7, world_size=1)
    assert "note " not in said
    three, said = launched(tmp_path, odd, "three", 7)
    assert said.count("note     model.mean: updated by the recipe's own code") == 1
    torch.testing.assert_close(three["model/mean"], alone["model/mean"], rtol=1e-13, atol=0)


def test_parameters_that_are_frozen_and_unfrozen_on_the_way(tmp_path, odd):
    alone, _ = launched(tmp_path, odd, "alone", 21, "--freeze", world_size=1)
    two, _ = launched(tmp_path, odd, "two", 21, "--freeze", world_size=2)
    for name in ("body.weight", "body.bias"):
        torch.testing.assert_close(two[f"model/{name}"], alone[f"model/{name}"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "flags, words",
    [
        ((), "--gradient-sync ddp: model.unused gets no gradient, and DDP waits for every parameter"),
        (("--freeze",), "--gradient-sync ddp: parameters of 'model' were frozen or unfrozen after the start"),
    ],
)
def test_what_ddp_does_not_serve_is_one_line(tmp_path, odd, flags, words):
    flags = [*QUIET, "--runs-dir", tmp_path, "--gradient-sync", "ddp", *flags]
    processes = Processes(2, [odd, *flags], folder=tmp_path)
    codes = processes.wait()
    assert 2 in codes, processes.said()
    (line,) = [line for line in processes.said().splitlines() if line.startswith("error:")]
    assert words in line and "use --gradient-sync step" in line and "Traceback" not in processes.said()
