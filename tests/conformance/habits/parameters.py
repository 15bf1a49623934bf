"""Parameters of every kind: tied, expanded, empty, scalar, complex, of other types and layouts, unused, sparse."""

import copy

import torch
from conformance.habit import ALONE, MODES, ONE_PROCESS, THREE, THREE_RESUMED, Habit
from torch import nn


def adam(self, name, network):
    return torch.optim.Adam(network.parameters(), lr=self.lr)


class Tied(Habit):
    """Two layers that share one weight."""

    def network(self):
        network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 1))
        network[2].weight = network[0].weight
        return network

    optimizer = adam


class Expanded(Habit):
    """A parameter of stride 0, which is one number."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)
            self.scale = nn.Parameter(torch.ones(1).double().expand(4))

        def forward(self, x):
            return self.linear(x * self.scale)

    def networks(self):
        network = self.Network()
        network.linear.double()
        return {"model": network}

    def optimizer(self, name, network):
        return torch.optim.SGD(network.linear.parameters(), lr=self.lr, fused=True)


class ExpandedTrained(Expanded):
    """The same in an optimizer, where torch itself can't update it."""

    modes = (ALONE, THREE)
    refused = "is expanded"

    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr)


class ZeroSized(Habit):
    """A parameter without elements beside others."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)
            self.nothing = nn.Parameter(torch.empty(0, 4))

        def forward(self, x):
            return self.linear(x) + self.nothing.sum()

    def network(self):
        return self.Network()

    optimizer = adam


class Scalar(Habit):
    """A 0-d parameter, a learned temperature."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)
            self.temperature = nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            return self.linear(x) * self.temperature.exp()

    def network(self):
        return self.Network()

    optimizer = adam


class Complex(Habit):
    """A complex128 parameter, a filter in the frequency domain."""

    modes = (ALONE, THREE)
    refused = "complex128"

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)
            self.filter = nn.Parameter(torch.randn(3, dtype=torch.complex128))

        def forward(self, x):
            return self.linear(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=4))

    def network(self):
        return self.Network()

    optimizer = adam


class Complex64(Complex):
    """The same in single precision."""

    modes = MODES
    refused = ""
    rounding_on_three = loss_rounding = 1e-5

    def networks(self):
        network = self.Network()
        network.filter = nn.Parameter(network.filter.detach().to(torch.complex64))
        return {"model": network}

    def loss(self, networks, batch):
        return super().loss(networks, tuple(tensor.float() for tensor in batch))


class BFloat16(Habit):
    """A layer in bfloat16 within a float32 network: bits on one process."""

    modes = ONE_PROCESS
    loss_rounding = 1e-6

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8).bfloat16(), nn.Linear(8, 1)

        def forward(self, x):
            return self.last(self.first(x.bfloat16()).float().tanh())

    def networks(self):
        return {"model": self.Network()}

    def loss(self, networks, batch):
        return super().loss(networks, tuple(tensor.float() for tensor in batch))

    optimizer = adam


class MixedTypes(Habit):
    """A float32 layer within a float64 network."""

    modes = ONE_PROCESS

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1).double()

        def forward(self, x):
            return self.last(self.first(x.float()).double().tanh())

    def networks(self):
        return {"model": self.Network()}

    optimizer = adam


class NonContiguous(Habit):
    """A parameter that is a transposed view."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4).double().t())
            self.last = nn.Linear(8, 1).double()

        def forward(self, x):
            return self.last((x @ self.weight).tanh())

    def networks(self):
        return {"model": self.Network()}

    optimizer = adam


class Unused(Habit):
    """A layer that no forward pass uses, with an optimizer that has decay."""

    def network(self):
        network = super().network()
        network.unused = nn.Linear(3, 3)
        network.forward = lambda x: network[2](network[1](network[0](x)))
        return network

    def optimizer(self, name, network):
        return torch.optim.AdamW(network.parameters(), lr=self.lr, weight_decay=0.1)


class ByteUnderAverage(Habit):
    """A uint8 parameter without gradient beside others, under a moving average that the evaluation uses."""

    def __post_init__(self):
        self.ema_decay = 0.9

    def network(self):
        network = super().network()
        network.register_parameter("table", nn.Parameter(torch.arange(4, dtype=torch.uint8), requires_grad=False))
        network.forward = lambda x: network[2](network[1](network[0](x)))
        return network

    def train(self, networks, loop):
        model = networks["model"]
        optimizer, step = self.optimizer("model", model), 0
        average = {key: value.clone() for key, value in model.state_dict().items()}
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
                step += 1
                decay = min(0.9, (1 + step) / (10 + step))
                for key, value in model.state_dict().items():
                    if value.is_floating_point():
                        average[key] = average[key] + (1 - decay) * (value - average[key])
            trained = copy.deepcopy(model.state_dict())
            model.load_state_dict(average)
            loop.test(networks)
            model.load_state_dict(trained)


class SparseEmbedding(Habit):
    """nn.Embedding(sparse=True) with SparseAdam, by a network of its own for each optimizer."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 1, sparse=True)

        def forward(self, x):
            return self.table((x[:, 0].abs() * 4).long().clamp(max=9)) * x[:, 1:2]

    def network(self):
        return self.Network()

    def optimizer(self, name, network):
        return torch.optim.SparseAdam(network.parameters(), lr=self.lr)


class SparseWithSGD(SparseEmbedding):
    """The same with plain SGD, and rows that no example of a batch has."""

    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr)


class SparseAndDecayed(SparseWithSGD):
    """The same with a penalty on all weights in the loss, which makes the gradient dense."""

    def loss(self, networks, batch):
        return super().loss(networks, batch) + 0.01 * sum(p.square().sum() for p in networks["model"].parameters())


class EmbeddingBag(Habit):
    """nn.EmbeddingBag with a padding index, and its mean."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag = nn.EmbeddingBag(10, 3, mode="mean", padding_idx=0)
            self.read = nn.Linear(3, 1)

        def forward(self, x):
            return self.read(self.bag((x.abs() * 4).long().clamp(max=9)))

    def network(self):
        return self.Network()

    optimizer = adam


class Outside(Habit):
    """A parameter outside the networks in the optimizer: it would not be saved."""

    modes = (ALONE, THREE)
    refused = "holds a parameter of shape (1,) that is not in that network"

    def optimizer(self, name, network):
        self.temperature = nn.Parameter(torch.ones(1))
        return torch.optim.SGD([*network.parameters(), self.temperature], lr=self.lr)


class SpectralNorm(Habit):
    """torch.nn.utils.parametrizations.spectral_norm, whose buffers a power iteration updates in each pass."""

    modes = MODES

    says = {mode: "updated by the recipe's own code" for mode in (THREE, THREE_RESUMED)}

    def network(self):
        network = super().network()
        nn.utils.parametrizations.spectral_norm(network[0])
        return network


class WeightNorm(Habit):
    """torch.nn.utils.parametrizations.weight_norm."""

    def network(self):
        network = super().network()
        nn.utils.parametrizations.weight_norm(network[0])
        return network


class OldSpectralNorm(SpectralNorm):
    """torch.nn.utils.spectral_norm, by a forward pre-hook that sets an attribute."""

    def network(self):
        network = Habit.network(self)
        nn.utils.spectral_norm(network[0])
        return network


class Pruned(Habit):
    """torch.nn.utils.prune, which turns a parameter into a parameter, a mask and a forward pre-hook."""

    def network(self):
        from torch.nn.utils import prune

        network = super().network()
        prune.l1_unstructured(network[0], "weight", amount=0.3)
        return network


class ParameterList(Habit):
    """Parameters in a ParameterList and a ParameterDict, used by index."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList(torch.randn(4, 4) for _ in range(2))
            self.heads = nn.ParameterDict({"out": nn.Parameter(torch.randn(4, 1))})

        def forward(self, x):
            for weight in self.weights:
                x = (x @ weight).tanh()
            return x @ self.heads["out"]

    def network(self):
        return self.Network()


class ViewAfterConvolution(Habit):
    """view(-1) after convolutions, which needs their layout."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 2, padding=1)
            self.read = nn.Linear(27, 1)

        def forward(self, x):
            x = self.conv(x.view(-1, 1, 2, 2)).relu()
            return self.read(x.view(x.size(0), -1))

    def network(self):
        return self.Network()
