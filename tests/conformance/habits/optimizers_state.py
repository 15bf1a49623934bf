"""Optimizers of a user's own whose state is out of the ordinary: its keys, its values, one tensor in several places."""

import collections
import enum

import torch
from conformance.habit import ACCUMULATED, ALONE, RESUMED, THREE, Habit
from torch import nn


class Own(torch.optim.Optimizer):
    """Calls `one` for each parameter."""

    def __init__(self, parameters, lr, **options):
        super().__init__(parameters, {"lr": lr, **options})
        self.made()

    def made(self):
        """For attributes."""

    def before(self):
        """Called before each step."""

    @torch.no_grad()
    def step(self, closure=None):
        self.before()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.one(group, parameter, self.state[parameter])

    @property
    def parameters(self):
        return [parameter for group in self.param_groups for parameter in group["params"]]


def uses(kind):
    """A habit that trains with an optimizer class."""

    class Uses(Habit):
        def optimizer(self, name, network):
            return kind(network.parameters(), self.lr)

    return Uses


class ByDimension(Own):
    """A state for each dimension, as Shampoo's, and names with a slash."""

    def one(self, group, p, state):
        rate = group["lr"]
        for d, size in enumerate(p.shape):
            if d not in state:
                state[d] = torch.ones(size, dtype=p.dtype)
                state[f"count/{d}"] = state[str(d)] = state[(d, "pair")] = 0
            state[d] += 0.1
            state[f"count/{d}"] += 1
            state[str(d)] += 2
            state[d, "pair"] += 3
            rate *= (state[d].mean() + state[f"count/{d}"] + state[str(d)] + state[d, "pair"]) ** -0.25
        p.sub_(p.grad * rate)


class OddKeys(uses(ByDimension)):
    """Keys that are ints and tuples, and have slashes."""


class OneCounter(Own):
    """A counter that is an attribute and the state of each parameter."""

    def made(self):
        self.steps = torch.zeros((), dtype=torch.float64)

    def one(self, group, p, state):
        state.setdefault("step", self.steps)
        state["step"] += 1
        p.add_(p.grad, alpha=-group["lr"] / state["step"].item() ** 0.5)


class CounterIsAttribute(uses(OneCounter)):
    """One tensor, in all states and in an attribute."""


class FirstsState(Own):
    """What the first parameter's state has is in that of the others, too."""

    def one(self, group, p, state):
        if not state:
            first = self.state[self.parameters[0]]
            state["step"] = first.get("step", torch.zeros((), dtype=torch.float64))
            state["list"] = first.get("list", [0])
            state["itself"] = p
        state["step"] += 1
        state["list"][0] += 1
        state["itself"].add_(p.grad, alpha=-group["lr"] / (state["step"].item() + state["list"][0]) ** 0.5)


class SharedState(uses(FirstsState)):
    """One tensor and one list in all states, and the parameter itself."""


class FlatMomentum(Own):
    """One buffer for all, of which the states are views."""

    def made(self):
        self.flat = torch.zeros(sum(p.numel() for p in self.parameters), dtype=torch.float64)
        parts = self.flat.split([p.numel() for p in self.parameters])
        for p, part in zip(self.parameters, parts, strict=True):
            self.state[p]["m"] = part.view_as(p)

    def before(self):
        self.flat.mul_(0.9)

    def one(self, group, p, state):
        state["m"].add_(p.grad)
        p.add_(state["m"], alpha=-group["lr"])


class FlatBuffer(uses(FlatMomentum)):
    """Views made with the optimizer."""


class ReplacedViews(FlatMomentum):
    """The states become tensors of their own in the second step; the buffer is used on."""

    def made(self):
        super().made()
        self.steps = 0

    def before(self):
        self.steps += 1
        if self.steps == 2:
            for p in self.parameters:
                self.state[p]["m"] = self.state[p]["m"].clone()
        self.flat.mul_(0.9).add_(0.01)

    def one(self, group, p, state):
        state["m"].mul_(0.8).add_(p.grad)
        p.add_(state["m"], alpha=-group["lr"] * (1 + self.flat.sum().item()))


class ViewsReplaced(uses(ReplacedViews)):
    """Views made with the optimizer, and replaced."""


class LateFlatMomentum(FlatMomentum):
    """Makes its buffer in the first step."""

    def made(self):
        self.flat = None

    def before(self):
        if self.flat is None:
            super().made()
        super().before()


class LateFlatBuffer(uses(LateFlatMomentum)):
    """Views made in the first step: they would be copies."""

    says = dict.fromkeys((ALONE, ACCUMULATED, THREE), "shares memory with its attribute flat")
    limits = {RESUMED: "shares memory with its attribute flat; in a resumed run it is a copy"}


Statistics = collections.namedtuple("Statistics", "mean count")


class Phase(enum.IntEnum):
    """A number with a name."""

    WARM = 1
    COLD = 2


class OddValues(Own):
    """Values of Python's less common types."""

    def before(self):
        counts = self.state["all"].setdefault("counts", collections.defaultdict(int))
        counts[f"step {len(counts) % 3}"] += 1
        self.total = sum(counts.values())

    def one(self, group, p, state):
        if not state:
            state["statistics"], state["phase"], state["size"] = Statistics(0.0, 0), Phase.WARM, p.shape
            state["by"] = collections.defaultdict(list)
            state["leaf"] = torch.ones(1, dtype=p.dtype, requires_grad=True)
        state["statistics"] = Statistics(state["statistics"].mean + 0.1, state["statistics"].count + 1)
        state["by"][self.total % 2].append(1)
        state["phase"] = Phase.COLD if state["phase"].name == "WARM" else Phase.WARM
        divided = state["statistics"].mean + len(state["by"][0]) + state["phase"] + state["size"].numel()
        if not state["leaf"].requires_grad:
            divided = 0.0
        p.add_(p.grad, alpha=-group["lr"] / divided**0.5)


class OddTypes(uses(OddValues)):
    """A NamedTuple, an enum, a shape, defaultdicts, a leaf that takes gradients."""


class OddGroups(Own):
    """Options of groups of less common types."""

    def one(self, group, p, state):
        low, high = group["bounds"]
        group["bounds"] = (low * 0.99, high)
        group["scale"].mul_(0.99)
        group["phase"] = Phase.COLD if group["phase"].name == "WARM" else Phase.WARM
        p.sub_(p.grad.clamp(low, high) * group["scale"][0] * group["lr"] / group["phase"].value)


class OddOptions(Habit):
    """A tuple with infinity, a tensor of one number, an enum."""

    def optimizer(self, name, network):
        scale = torch.ones(1, dtype=torch.float64)
        return OddGroups(network.parameters(), self.lr, bounds=(-3.0, float("inf")), scale=scale, phase=Phase.WARM)


class SharedRate(Habit):
    """One tensor is the rate of two groups, and an attribute of the recipe that a hook changes."""

    def optimizer(self, name, network):
        self.rate = torch.tensor(self.lr, dtype=torch.float64)
        groups = [{"params": list(layer.parameters()), "lr": self.rate} for layer in (network[0], network[2])]
        return torch.optim.SGD(groups, momentum=0.9, foreach=False)

    def after_step(self, networks, step):
        self.rate.mul_(0.8)

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
                self.after_step(networks, 0)
            loop.test(networks)


class Wide(Own):
    """Momentum in float64 and counts in int64, whatever the weights' dtype."""

    def one(self, group, p, state):
        if not state:
            state["m"] = torch.zeros(p.shape, dtype=torch.float64)
            state["count"] = torch.zeros(p.shape, dtype=torch.int64)
            state["word"] = "a string"
        state["m"].mul_(0.9).add_(p.grad.double())
        state["count"] += p.grad > 0
        assert state["word"] == "a string"
        p.add_(state["m"] / (1 + state["count"].double()), alpha=-group["lr"])


class Wrapped(torch.optim.Optimizer):
    """Steps another optimizer."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure=None):
        self.inner.step()


class WideInner(Habit):
    """The inner optimizer's state is of other dtypes than the weights, which are float32 in part."""

    def network(self):
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), ToSingle(), nn.Linear(8, 1))

    def networks(self):
        network = self.network().double()
        network[3].float()
        return {"model": network}

    rounding_on_three = 1e-5
    rounding = 1e-5  # of sums in float32

    def optimizer(self, name, network):
        return Wrapped(Wide(network.parameters(), self.lr))


class ToSingle(nn.Module):
    """Casts to float32."""

    def forward(self, x):
        return x.float()


class KeyedByATensor(Own):
    """State under a tensor that is no parameter."""

    def made(self):
        self.key = torch.zeros(1)

    def one(self, group, p, state):
        self.state[self.key]["steps"] = 1


class KeyOfATensor(uses(KeyedByATensor)):
    """State under a tensor that is no parameter: it can't be found again."""

    modes = (ALONE,)
    stops = "its state has a Tensor as a key, which can't be saved; keep it under a string or number"


class Complex128(Own):
    """State that a file can't hold."""

    def one(self, group, p, state):
        state["kept"] = [{"spectrum": torch.zeros(2, dtype=torch.complex128)}]


class Unsavable(uses(Complex128)):
    """State of complex128: the line names it, not the list that it is in."""

    modes = (ALONE,)
    stops = "its state holds a Tensor (complex128), which JSON and tensors can't hold"
