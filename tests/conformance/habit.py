"""What the habits share: a small regression in float64, and what is expected of each way of running it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from nndist.data.sets import Data, Resident
from nndist.recipe.contract import Recipe

ALONE, ACCUMULATED, RESUMED = "alone", "accumulated", "resumed"
THREE, THREE_RESUMED = "three", "three_resumed"
MODES = (ALONE, ACCUMULATED, RESUMED, THREE, THREE_RESUMED)
ONE_PROCESS = (ALONE, ACCUMULATED, RESUMED)


@dataclass(kw_only=True)
class Habit(Recipe):
    """40 examples in batches of 12, the last of each epoch of 4: 12 steps, killed after the 7th, resumed from the 5th.

    `train` is the loop by hand that the habit is compared with: it uses what PyTorch has, `loop` gives it the examples
    in their order and notes the losses down.
    """

    modes: ClassVar[tuple[str, ...]] = MODES
    """In which the habit is tried; its docstring says why not in others."""
    refused: ClassVar[str | dict[str, str]] = ""
    """The line that it is refused with, in every mode or by mode."""
    says: ClassVar[dict[str, str]] = {}
    """Part of what is said of it, by mode."""
    limits: ClassVar[dict[str, str]] = {}
    """Modes in which other weights come out; the text is in what was said."""
    per_process: ClassVar[bool] = False
    """Whether each process has random numbers or counts of its own: three are compared with three replicas by hand."""
    bugs: ClassVar[dict[str, str]] = {}
    """What is wrong at present, by mode."""
    stops: ClassVar[str] = ""
    """The line that the run ends with in its midst, where nothing could tell before."""
    rounding: ClassVar[float] = 0.0
    """How far one process may be from the loop by hand, where both add up in another order; else it is bits."""
    loss_rounding: ClassVar[float] = 1e-12
    """The same of losses and scores, which are recorded in float64."""
    rounding_on_three: ClassVar[float] = 1e-12
    """The same of three processes."""

    epochs: int = 3
    batch_size: int = 12
    lr: float = 0.05

    def __post_init__(self):
        """For habits that make something of their own."""

    def data(self, config):
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(40, 4, generator=generator).double()
        y = x.square().sum(1, keepdim=True) / 2 - x[:, :1]
        return Data(train=Resident(x, y), test=Resident(x[:9].flip(0), y[:9].flip(0)))

    def network(self):
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def networks(self):
        return {"model": self.network().double()}

    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr)

    def loss(self, networks, batch):
        x, y = batch
        return (networks["model"](x) - y).square().mean(1)

    def score(self, networks, batch):
        return {"loss": self.loss(networks, batch)}

    def initialise(self, networks, data):
        """What the loop by hand does before the first step, with the random numbers of the initial weights."""

    def witness(self, networks):
        """More tensors or numbers that must come out alike."""
        return {}

    def train(self, networks, loop):
        """What a tutorial writes; habits that need more write their own."""
        model = networks["model"]
        optimizer = self.optimizer("model", model)
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
            loop.test(networks)


@dataclass(kw_only=True)
class TwoNetworks(Habit):
    """A GAN on points of the plane; its noise is part of the data."""

    def data(self, config):
        generator = torch.Generator().manual_seed(6)
        points = torch.randn(40, 2, generator=generator).double() * 0.3 + 1.0
        noise = torch.randn(40, 3, generator=generator).double()
        return Data(train=Resident(points, noise), test=Resident(points[:9], noise[:9]))

    def networks(self):
        def mlp(inputs, outputs):
            return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, outputs)).double()

        return {"critic": mlp(2, 1), "generator": mlp(3, 2)}

    def objectives(self):
        return {"critic": self.critic_loss, "generator": self.generator_loss}

    def critic_loss(self, networks, batch):
        real, noise = batch
        fake = networks["generator"](noise).detach()
        softplus = nn.functional.softplus
        return (softplus(-networks["critic"](real)) + softplus(networks["critic"](fake))).squeeze(1)

    def generator_loss(self, networks, batch):
        return nn.functional.softplus(-networks["critic"](networks["generator"](batch[1]))).squeeze(1)

    def score(self, networks, batch):
        return {"loss": self.generator_loss(networks, batch)}

    def train(self, networks, loop):
        optimizers = {name: self.optimizer(name, network) for name, network in networks.items()}
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                for name, loss in (("critic", self.critic_loss), ("generator", self.generator_loss)):
                    networks[name].zero_grad()
                    loop.backward(loss, networks, batch, name)
                    optimizers[name].step()
            loop.test(networks)
