"""What the network does depends on a number that Python holds, and no tensor."""

import types
from collections import deque
from dataclasses import dataclass

import torch
from conformance.habit import Habit
from torch import nn

CALLS = {"forward": 0}
BACKWARD = {"calls": 0}
NESTED = types.SimpleNamespace(inner=types.SimpleNamespace(calls=0))
STEPS = 0
SEEN = []


class Plain(Habit):
    """Nothing unusual."""


class ModuleDict(Habit):
    """A counter in a module-level dict."""

    class Network(nn.Sequential):
        def forward(self, x):
            CALLS["forward"] += 1
            return super().forward(x) * (2.0 if CALLS["forward"] > 9 else 1.0)

    def network(self):
        return self.Network(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


class Global(Habit):
    """A counter that a function rebinds by `global`."""

    def loss(self, networks, batch):
        global STEPS
        if networks["model"].training:
            STEPS += 1
        return super().loss(networks, batch) * (0.5 if STEPS > 6 else 1.0)


def counting():
    calls = 0

    def factor():
        nonlocal calls
        calls += 1
        return 1.0 + 0.1 * calls

    return factor


class Closure(Habit):
    """A counter in a closure that the network holds."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)
            self.factor = counting()

        def forward(self, x):
            return self.linear(x) * self.factor()

    def network(self):
        return self.Network()


class DictAttribute(Habit):
    """A counter in a dict that is an attribute of the module."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)
            self.state = {"calls": 0}

        def forward(self, x):
            self.state["calls"] += 1
            return self.linear(x) / self.state["calls"] ** 0.1

    def network(self):
        return self.Network()


class NestedObject(Habit):
    """A counter in an object within an object."""

    class Network(nn.Sequential):
        def forward(self, x):
            NESTED.inner.calls += 1
            return super().forward(x) + 0.01 * NESTED.inner.calls

    def network(self):
        return self.Network(nn.Linear(4, 1))


class Temperature:
    """Falls with each call, in training."""

    def __init__(self):
        self.value = 2.0

    def __call__(self):
        self.value *= 0.95
        return self.value


class AnnealedTemperature(Habit):
    """A helper object anneals a temperature as it is asked."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.out = nn.Linear(3, 1)
            self.temperature = Temperature()

        def forward(self, x):
            return self.out((self.linear(x) / self.temperature()).softmax(1))

    def network(self):
        return self.Network()


class CountingBackward(torch.autograd.Function):
    """The identity, whose gradient shrinks with each backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        BACKWARD["calls"] += 1
        return gradient * (0.5 if BACKWARD["calls"] > 6 else 1.0)


class BackwardReadsCounter(Habit):
    """An autograd.Function whose backward pass counts its calls."""

    class Network(nn.Sequential):
        def forward(self, x):
            return CountingBackward.apply(super().forward(x))

    def network(self):
        return self.Network(nn.Linear(4, 1))


class LazyRegularisation(Habit):
    """A penalty at every third step, by a counter of the recipe."""

    calls = 0

    def loss(self, networks, batch):
        losses = super().loss(networks, batch)
        if not networks["model"].training:
            return losses
        self.calls += 1
        if self.calls % 3:
            return losses
        return losses + 0.1 * sum(p.square().sum() for p in networks["model"].parameters())


class TermSwitchedOn(Habit):
    """A term of the loss that begins after six calls, counted on the class."""

    calls = 0

    def loss(self, networks, batch):
        x, y = batch
        answer = networks["model"](x)
        type(self).calls += networks["model"].training
        losses = (answer - y).square().mean(1)
        return losses + (answer.abs().mean(1) if type(self).calls > 6 else 0.0)


class CallableAttribute(Habit):
    """`forward` replaced on an instance by a function that counts."""

    def network(self):
        network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        forward, calls = network.forward, [0]

        def replaced(x):
            calls[0] += 1
            return forward(x) * (1.0 + 0.05 * calls[0])

        network.forward = replaced
        return network


class OldAnswers(Habit):
    """A deque of the last three losses, which scale the next one."""

    def __post_init__(self):
        self.last = deque(maxlen=3)

    def train(self, networks, loop):
        model, last = networks["model"], deque(maxlen=3)
        optimizer = self.optimizer("model", model)
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(lambda nets, part: super(OldAnswers, self).loss(nets, part), networks, batch)
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * (1.0 + len(last))
                last.append(1)
                optimizer.step()
            loop.test(networks)

    def optimizer(self, name, network):
        self.used = super().optimizer(name, network)
        return self.used

    def before_update(self, name, network):
        self.used.param_groups[0]["lr"] = self.lr * (1.0 + len(self.last))
        self.last.append(1)


class AttributeInSnapshot(Habit):
    """An attribute of the recipe that `snapshot` changes after each evaluation."""

    factor = 1.0

    def loss(self, networks, batch):
        return super().loss(networks, batch) * self.factor

    def score(self, networks, batch):
        return {"loss": super().loss(networks, batch)}

    def snapshot(self, networks, data):
        self.factor *= 0.5
        return {}

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
            loop.test(networks)
            self.factor *= 0.5


class CounterInPrepare(Habit):
    """Data.prepare counts its calls and scales by them."""

    def data(self, config):
        data, state = super().data(config), {"calls": 0}
        self.state = state

        def prepare(batch):
            state["calls"] += 1
            return batch[0] * (1.0 + 0.01 * state["calls"]), batch[1]

        data.prepare = prepare
        return data


class PrepareInPlace(Habit):
    """Data.prepare changes the batch it is given in place."""

    def data(self, config):
        data = super().data(config)

        def prepare(batch):
            batch[0].mul_(0.5).add_(0.1)
            return batch

        data.prepare = prepare
        return data


class PenaltyByScheduleStep(Habit):
    """A penalty at every third step, by the step that lr_factor was given."""

    step = 0

    def lr_factor(self, step, total_steps):
        self.step = step
        return 1.0

    def loss(self, networks, batch):
        penalty = 0.1 * sum(p.square().sum() for p in networks["model"].parameters())
        return super().loss(networks, batch) + (penalty if self.step % 3 == 0 else 0.0)

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
                self.step += 1
            self.step -= 1  # of the last step, as the evaluation sees it
            loop.test(networks)
            self.step += 1


@dataclass
class Curriculum:
    """Says how hard the examples may be."""

    level: int = 1
    history: tuple = ()


class DataclassState(Habit):
    """A dataclass of the recipe's own that `after_step` replaces by a new one."""

    def __post_init__(self):
        self.curriculum = Curriculum()

    def loss(self, networks, batch):
        return super().loss(networks, batch) / self.curriculum.level

    def after_step(self, networks, step):
        if step % 2 == 0:
            self.curriculum = Curriculum(self.curriculum.level + 1, (*self.curriculum.history, step))

    def train(self, networks, loop):
        optimizer, step = self.optimizer("model", networks["model"]), 0
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
                step += 1
                if step % 2 == 0:
                    self.curriculum.level += 1
            loop.test(networks)


class ListGrows(Habit):
    """A module-level list to which each training step appends, and whose length matters."""

    def loss(self, networks, batch):
        if networks["model"].training:
            SEEN.append(len(SEEN))
        return super().loss(networks, batch) * (1.0 + 0.1 * len(SEEN))
