"""Modules whose state_dict shows other tensors than they hold, extra states, lazy layers, compiled forwards."""

import enum

import torch
from conformance.habit import ALONE, ONE_PROCESS, RESUMED, THREE, THREE_RESUMED, Habit
from torch import nn


class ExtraTensor(Habit):
    """get_extra_state gives a tensor, which the forward pass uses and training changes."""

    class Network(nn.Sequential):
        def __init__(self, *layers):
            super().__init__(*layers)
            self.scale = torch.ones(())

        def get_extra_state(self):
            return self.scale

        def set_extra_state(self, state):
            self.scale = state

        def forward(self, x):
            if self.training:
                self.scale = self.scale * 1.05
            return super().forward(x) * self.scale

    def network(self):
        return self.Network(nn.Linear(4, 1))


class ExtraJson(Habit):
    """get_extra_state gives a dict of numbers and texts."""

    class Network(nn.Sequential):
        calls = 0

        def get_extra_state(self):
            return {"calls": self.calls, "unit": "passes", "half": [self.calls / 2]}

        def set_extra_state(self, state):
            self.calls = state["calls"]

        def forward(self, x):
            self.calls += self.training
            return super().forward(x) * (1 + 0.1 * self.calls)

    def network(self):
        return self.Network(nn.Linear(4, 1))


class ExtraObject(Habit):
    """get_extra_state gives an object that only a pickle could hold."""

    modes = (ALONE, THREE)
    refused = "get_extra_state() of Network returns what JSON and tensors can't hold"

    class Network(nn.Sequential):
        def get_extra_state(self):
            return object()

        def set_extra_state(self, state):
            pass

    def network(self):
        return self.Network(nn.Linear(4, 1))


class DerivedByHook(Habit):
    """A state_dict hook that gives weights for export in another form, and hides the training's own."""

    class Network(nn.Sequential):
        def __init__(self, *layers):
            super().__init__(*layers)
            self._register_state_dict_hook(self.folded)

        @staticmethod
        def folded(module, state, prefix, metadata):
            state[f"{prefix}0.weight"] = state[f"{prefix}0.weight"] * 2.0
            del state[f"{prefix}0.bias"]
            return state

    def network(self):
        return self.Network(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


class PrefixStripped(Habit):
    """A state_dict that an override renames, and a load_state_dict pre-hook that renames back."""

    class Network(nn.Sequential):
        def state_dict(self, *arguments, **named):
            return {f"module.{name}": tensor for name, tensor in super().state_dict(*arguments, **named).items()}

        def load_state_dict(self, state, *arguments, **named):
            return super().load_state_dict(
                {n.removeprefix("module."): t for n, t in state.items()}, *arguments, **named
            )

    def network(self):
        return self.Network(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


class GrowingList(Habit):
    """A ModuleList that grows after an epoch: its new layer could not come back, so the run ends at its next save."""

    modes = (ALONE,)
    stops = "model.layers.1.weight: the network has gained this parameter while it trains"

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4)])
            self.read = nn.Linear(4, 1)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).tanh()
            return self.read(x)

    def network(self):
        return self.Network()

    def optimizer(self, name, network):
        self.used = super().optimizer(name, network)
        return self.used

    def grow(self, network, optimizer):
        layer = nn.Linear(4, 4).double()
        with torch.no_grad():
            layer.weight.fill_(0.1)
            layer.bias.zero_()
        network.layers.append(layer)
        optimizer.add_param_group({"params": list(layer.parameters())})

    def after_epoch(self, networks, epoch):
        if epoch == 1:
            self.grow(networks["model"], self.used)

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
            if epoch == 0:
                self.grow(networks["model"], optimizer)
            loop.test(networks)


class LazyLinear(Habit):
    """Lazy layers, which take their shapes from the first examples."""

    def networks(self):
        return {"model": nn.Sequential(nn.LazyLinear(8, dtype=torch.float64), nn.Tanh(), nn.LazyLinear(1).double())}

    def initialise(self, networks, data):
        with torch.no_grad():
            networks["model"].eval()(data.train.tensors[0][:12])


class LazyBatchNorm(LazyLinear):
    """LazyBatchNorm1d, which becomes a BatchNorm that no later network sees as lazy."""

    def networks(self):
        layers = nn.LazyLinear(8, dtype=torch.float64), nn.LazyBatchNorm1d(dtype=torch.float64), nn.Tanh()
        return {"model": nn.Sequential(*layers, nn.LazyLinear(1, dtype=torch.float64))}


class LazyAndCounted(LazyLinear):
    """Lazy layers, and a loss and a `prepare` that count their calls: what makes the shapes does not count."""

    def __post_init__(self):
        self.calls = 0

    def data(self, config):
        data, state = super().data(config), {"calls": 0}

        def prepare(batch):
            state["calls"] += 1
            return batch[0] * (1.0 + 0.01 * state["calls"]), batch[1]

        data.prepare = prepare
        return data

    def loss(self, networks, batch):
        self.calls += 1
        return super().loss(networks, batch) * (1.0 + 0.1 * self.calls)

    modes = ONE_PROCESS


class Compiled(Habit):
    """A forward pass under torch.compile, by a back end that runs the graph as it is."""

    def network(self):
        network = super().network()
        network.forward = torch.compile(network.forward, backend="eager")
        return network


class CompiledModule(Habit):
    """torch.compile of the module, whose names then begin with _orig_mod."""

    def networks(self):
        return {"model": torch.compile(self.network().double(), backend="eager")}


class Scripted(Habit):
    """A traced module within the network."""

    modes = ONE_PROCESS

    def network(self):
        return nn.Sequential(torch.jit.trace(nn.Linear(4, 8).double(), torch.zeros(1, 4).double()), nn.Linear(8, 1))


class Kind(enum.Enum):
    """Which activation to use."""

    TANH = "tanh"
    RELU = "relu"


class EnumAttribute(Habit):
    """An Enum on the recipe, which training changes."""

    def __post_init__(self):
        self.kind = Kind.TANH

    def loss(self, networks, batch):
        hidden = networks["model"][0](batch[0])
        hidden = hidden.tanh() if self.kind is Kind.TANH else hidden.relu()
        return (networks["model"][2](hidden) - batch[1]).square().squeeze(1)

    def after_step(self, networks, step):
        self.kind = Kind.RELU if step >= 3 else Kind.TANH

    def train(self, networks, loop):
        optimizer, step = self.optimizer("model", networks["model"]), 0
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
                step += 1
                self.kind = Kind.RELU if step >= 3 else Kind.TANH
            loop.test(networks)


class DeepNesting(Habit):
    """Modules in plain lists and dicts, which no parameters() finds, kept alive by an attribute: they do not train."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = nn.Linear(4, 1)
            self.hidden = [nn.Linear(4, 1).double()]

        def forward(self, x):
            return self.seen(x) + self.hidden[0](x)

    def network(self):
        return self.Network()


class StateAfterEvaluation(Habit):
    """after_evaluation keeps the best score and anneals a weight of the loss where it got better."""

    def __post_init__(self):
        self.best_so_far, self.weight = float("inf"), 1.0

    def loss(self, networks, batch):
        return super().loss(networks, batch) * self.weight

    def score(self, networks, batch):
        return {"loss": super().loss(networks, batch)}

    def hear(self, score):
        if score < self.best_so_far:
            self.best_so_far, self.weight = score, self.weight * 0.5

    def after_evaluation(self, networks, scores):
        self.hear(scores["test/loss"])

    def witness(self, networks):
        return {"weight": self.weight}

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
            self.hear(loop.test(networks))


class EvaluationModeKept(Habit):
    """A part of the network that the recipe keeps in evaluation mode from after_step on."""

    modes = (ALONE, RESUMED, THREE, THREE_RESUMED)
    says = {}

    def network(self):
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))

    def after_step(self, networks, step):
        if step == 3:
            networks["model"][1].eval()

    def train(self, networks, loop):
        optimizer, step = self.optimizer("model", networks["model"]), 0
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
                step += 1
                if step == 3:
                    networks["model"][1].eval()
            loop.test(networks)
            networks["model"][1].eval()


class ModuleReplaced(Habit):
    """A layer that after_epoch replaces by another object of the same shape, whose weights the optimizer does not hold.

    What the optimizer holds would then have no place in a checkpoint: the run ends at its next save.
    """

    modes = (ALONE,)
    stops = "model.2.weight: the network replaces this parameter while it trains"

    def network(self):
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def replace(self, network):
        layer = nn.Linear(8, 1).double()
        with torch.no_grad():
            layer.weight.fill_(0.1)
            layer.bias.zero_()
        network[2] = layer

    def after_epoch(self, networks, epoch):
        if epoch == 1:
            self.replace(networks["model"])
