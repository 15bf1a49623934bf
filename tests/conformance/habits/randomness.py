"""Random numbers: of the global generators, and of generators of a module's or recipe's own."""

import random

import numpy
import torch
from conformance.habit import ALONE, RESUMED, THREE, THREE_RESUMED, Habit
from torch import nn
from torch.utils.checkpoint import checkpoint

NOISE = torch.Generator().manual_seed(11)
PYTHON = random.Random(12)


class Dropout(Habit):
    """Dropout, whose masks come from a stream of each process."""

    per_process = True

    def network(self):
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 1))


class CheckpointedDropout(Habit):
    """Dropout under torch.utils.checkpoint (use_reentrant=False), which draws its masks again in the backward pass."""

    per_process = True

    class Network(nn.Module):
        reentrant = False

        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 8)
            self.block = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.4), nn.Tanh())
            self.last = nn.Linear(8, 1)

        def forward(self, x):
            x = self.first(x)
            return self.last(
                checkpoint(self.block, x, use_reentrant=self.reentrant) if self.training else self.block(x)
            )

    def network(self):
        return self.Network()


class ReentrantDropout(CheckpointedDropout):
    """The same with use_reentrant=True, where a backward pass runs within the backward pass."""

    class Network(CheckpointedDropout.Network):
        reentrant = True


class PythonsGenerator(Habit):
    """Input noise by Python's `random`, which is seeded for each process."""

    per_process = True

    def loss(self, networks, batch):
        x, y = batch
        return super().loss(networks, (x + (random.gauss(0, 0.1) if networks["model"].training else 0.0), y))


class NumpysGenerator(PythonsGenerator):
    """Input noise by `numpy.random`."""

    def loss(self, networks, batch):
        x, y = batch
        noise = numpy.random.standard_normal() * 0.1 if networks["model"].training else 0.0
        return Habit.loss(self, networks, (x + noise, y))


class OwnGenerator(Habit):
    """Noise from a torch.Generator that is an attribute of the module."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)
            self.generator = torch.Generator().manual_seed(3)

        def forward(self, x):
            return self.linear(x + 0.1 * torch.randn(1, 4, generator=self.generator).double())

    def network(self):
        return self.Network()


class ModuleGenerator(Habit):
    """Noise from a torch.Generator of the Python module, in the loss."""

    def loss(self, networks, batch):
        x, y = batch
        return super().loss(networks, (x + 0.1 * torch.randn(1, 4, generator=NOISE).double(), y))


class Mixup(Habit):
    """Mixup whose share is drawn by a random.Random of the recipe's own; the partners are the batch reversed.

    Not under accumulation and on three processes, where the partners are other ones.
    """

    modes = (ALONE, RESUMED, THREE_RESUMED)

    def __post_init__(self):
        self.random = random.Random(4)

    def loss(self, networks, batch):
        x, y = batch
        if networks["model"].training:
            share = self.random.betavariate(0.4, 0.4)
            x, y = share * x + (1 - share) * x.flip(0), share * y + (1 - share) * y.flip(0)
        return super().loss(networks, (x, y))


class StochasticDepth(Habit):
    """Blocks skipped at random by numpy.random.default_rng."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.last = nn.Linear(4, 1)
            self.random = numpy.random.default_rng(7)

        def forward(self, x):
            for block in self.blocks:
                if not self.training or self.random.random() > 0.4:
                    x = x + block(x).tanh()
            return self.last(x)

    def network(self):
        return self.Network()


class RandomState(Habit):
    """Noise by a numpy.random.RandomState in a list of the recipe."""

    def __post_init__(self):
        self.generators = [numpy.random.RandomState(5)]

    def loss(self, networks, batch):
        return super().loss(networks, batch) * (1 + 0.1 * self.generators[0].standard_normal())


class ModulesPython(Habit):
    """A random.Random of the Python module decides whether a batch is mirrored."""

    def loss(self, networks, batch):
        x, y = batch
        return super().loss(networks, (-x if networks["model"].training and PYTHON.random() < 0.5 else x, y))


class GradientNoise(Habit):
    """Noise added to the gradients before each update, by a generator of the recipe's own."""

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(8)

    def add_noise(self, network):
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=self.generator, dtype=torch.float64)
            parameter.grad.add_(noise, alpha=0.01)

    def before_update(self, name, network):
        self.add_noise(network)

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                self.add_noise(networks["model"])
                optimizer.step()
            loop.test(networks)


class DrawnInHook(Habit):
    """Weights shaken after each step by the global generator, as each process by itself: refused on three."""

    modes = (ALONE, RESUMED)

    def after_step(self, networks, step):
        with torch.no_grad():
            networks["model"][0].weight.add_(torch.randn(8, 4, dtype=torch.float64), alpha=0.01)

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
                with torch.no_grad():
                    networks["model"][0].weight.add_(torch.randn(8, 4, dtype=torch.float64), alpha=0.01)
            loop.test(networks)


class RandomReLU(Habit):
    """nn.RReLU, whose slopes are random in training."""

    per_process = True

    def network(self):
        return nn.Sequential(nn.Linear(4, 8), nn.RReLU(), nn.Linear(8, 1))


class Attention(Habit):
    """Self-attention with dropout within."""

    per_process = True

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(1, 8)
            self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
            self.read = nn.Linear(8, 1)

        def forward(self, x):
            return self.read(self.block(self.embed(x.unsqueeze(2))).mean(1))

    def network(self):
        return self.Network()


class EvaluationDraws(Habit):
    """A score that draws random numbers moves no later dropout, as if nobody had evaluated."""

    modes = (ALONE, RESUMED, THREE, THREE_RESUMED)
    says = dict.fromkeys((THREE, THREE_RESUMED), "draws random numbers: scores depend on the number of processes")
    per_process = True

    def network(self):
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.Linear(8, 1))

    def score(self, networks, batch):
        torch.rand(1)
        random.random()
        return {"loss": self.loss(networks, batch)}

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
            before = torch.get_rng_state()
            loop.test(networks)
            torch.set_rng_state(before)
