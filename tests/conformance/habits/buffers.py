"""Tensors that training changes and no gradient does: running means, queues, teachers, normalisers of one's own."""

import copy

import torch
from conformance.habit import ACCUMULATED, ALONE, ONE_PROCESS, RESUMED, THREE, THREE_RESUMED, Habit
from torch import nn

from nndist.data.sets import Data, Resident

MEAN = "updated by the recipe's own code; it is averaged over the processes after each step"
ON_THREE = {THREE: MEAN, THREE_RESUMED: MEAN}


class ReboundCounter(Habit):
    """A buffer that is rebound in the forward pass and read by torch.where."""

    says = ON_THREE

    class Network(nn.Sequential):
        def __init__(self, *layers):
            super().__init__(*layers)
            self.register_buffer("t", torch.zeros(()))

        def forward(self, x):
            if self.training:
                self.t = self.t + 1
            return super().forward(x) * torch.where(self.t > 6, 2.0, 1.0)

    def network(self):
        return self.Network(nn.Linear(4, 1))


class ReboundMean(Habit):
    """A running mean of the activations that is rebound."""

    says = ON_THREE

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return self.linear(x) + self.mean.sum()

    modes = ONE_PROCESS

    def network(self):
        return self.Network()


class MeanForLater(Habit):
    """A running mean that the forward pass of training does not use, as BatchNorm's: exact on three processes."""

    says = ON_THREE

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            if self.training:
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
                return self.linear(x)
            return self.linear(x - self.mean)

    def network(self):
        return self.Network()


class MeanOfBatchBefore(Habit):
    """The input less the running mean that the batches before have left: exact on three processes."""

    says = ON_THREE

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            answer = self.linear(x - self.mean)
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            return answer

    def network(self):
        return self.Network()


class HandMadeBatchNorm(Habit):
    """A hand-written BatchNorm with rebound statistics: on three each process normalises by its own part."""

    says = ON_THREE
    limits = {THREE: MEAN}

    class Norm(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.register_buffer("mean", torch.zeros(width))
            self.register_buffer("var", torch.ones(width))

        def forward(self, x):
            if not self.training:
                return (x - self.mean) / (self.var + 1e-5).sqrt()
            mean, var = x.mean(0), x.var(0, unbiased=False)
            self.mean = 0.9 * self.mean + 0.1 * mean.detach()
            self.var = 0.9 * self.var + 0.1 * var.detach()
            return (x - mean) / (var + 1e-5).sqrt()

    def network(self):
        return nn.Sequential(nn.Linear(4, 8), self.Norm(8), nn.Tanh(), nn.Linear(8, 1))


class BatchNorm(Habit):
    """nn.BatchNorm1d, whose statistics are those of the batch of all processes."""

    def network(self):
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


class BatchNormOverViews(BatchNorm):
    """Two views of each example as rows of one batch; of the last batch, of 2, one of three processes has none.

    Not accumulated: a batch of 2 is not split into single examples.
    """

    modes = (ALONE, RESUMED, THREE, THREE_RESUMED)

    def data(self, config):
        whole = super().data(config)
        return Data(train=Resident(*(tensor[:38] for tensor in whole.train.tensors)), test=whole.test)

    def loss(self, networks, batch):
        x, y = batch
        one, other = networks["model"](torch.cat([x, x.flip(1) * 0.8])).chunk(2)
        return ((one - y).square() + (one - other).square()).mean(1)


class BatchNormOfOwnClass(Habit):
    """A subclass that sets eps and momentum and inherits the forward pass, as EfficientNet's."""

    class Norm(nn.BatchNorm1d):
        def __init__(self, width):
            super().__init__(width, eps=1e-3, momentum=0.01)

    def network(self):
        return nn.Sequential(nn.Linear(4, 8), self.Norm(8), nn.Tanh(), nn.Linear(8, 1))


class BatchNormNotTracked(Habit):
    """Running statistics set to None, or never kept: scores depend on the number of processes, which is said.

    They are left out of the comparison: on three processes they do.
    """

    says = dict.fromkeys(
        (THREE, THREE_RESUMED),
        "model.1, model.3: without running statistics an evaluation normalises by each process's own batch",
    )

    def network(self):
        first, second = nn.BatchNorm1d(8), nn.BatchNorm1d(8, track_running_stats=False)
        first.running_mean = first.running_var = None
        return nn.Sequential(nn.Linear(4, 8), first, nn.Tanh(), second, nn.Linear(8, 1))

    def score(self, networks, batch):
        return {"loss": 0.0 * self.loss(networks, batch)}


class SyncBatchNorm(BatchNorm):
    """SyncBatchNorm, which torch has for GPUs only, as scripts that once ran on several of those convert to it."""

    def network(self):
        return nn.SyncBatchNorm.convert_sync_batchnorm(super().network())


class BatchNorm2d(Habit):
    """nn.BatchNorm2d over images, with momentum None, a cumulative mean, and without affine parameters."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 2, padding=1)
            self.norm = nn.BatchNorm2d(3, momentum=None, affine=False)
            self.read = nn.Linear(27, 1)

        def forward(self, x):
            return self.read(self.norm(self.conv(x.view(-1, 1, 2, 2))).relu().view(len(x), -1))

    def network(self):
        return self.Network()


class InstanceNormTracked(Habit):
    """nn.InstanceNorm2d with track_running_stats: exact on three processes, since it is linear in the batch."""

    says = ON_THREE

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 2, padding=1)
            self.norm = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
            self.read = nn.Linear(27, 1)

        def forward(self, x):
            return self.read(self.norm(self.conv(x.view(-1, 1, 2, 2))).relu().flatten(1))

    def network(self):
        return self.Network()


class InstanceNorm(InstanceNormTracked):
    """nn.InstanceNorm2d as it comes, which keeps no statistics: nothing is said of it."""

    says = {}

    def network(self):
        network = self.Network()
        network.norm = nn.InstanceNorm2d(3)
        return network


class GroupNorm(Habit):
    """GroupNorm and LayerNorm, which look at one example at a time."""

    def network(self):
        return nn.Sequential(nn.Linear(4, 8), nn.GroupNorm(2, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 1))


class NonPersistent(Habit):
    """A non-persistent buffer that training updates: no state_dict has it."""

    says = ON_THREE

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)
            self.register_buffer("steps", torch.zeros(()), persistent=False)

        def forward(self, x):
            if self.training:
                self.steps += 1
            return self.linear(x) / (1 + 0.1 * self.steps)

    def network(self):
        return self.Network()


class EMATeacher(Habit):
    """A teacher, a deep copy without gradients, that follows the student within the forward pass."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = nn.Linear(4, 1)
            self.teacher = copy.deepcopy(self.student).requires_grad_(False)

        def forward(self, x):
            if self.training:
                with torch.no_grad():
                    for mine, other in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                        mine.mul_(0.9).add_(other, alpha=0.1)
            return self.student(x) + 0.5 * self.teacher(x).detach()

    def network(self):
        return self.Network()


class TeacherInHook(Habit):
    """A teacher that `after_step` moves; it is an attribute of the recipe and a target in the loss."""

    def networks(self):
        networks = super().networks()
        self.teacher = copy.deepcopy(networks["model"]).requires_grad_(False)
        return networks

    def loss(self, networks, batch):
        losses = super().loss(networks, batch)
        x, _ = batch
        return losses + (networks["model"](x) - self.teacher(x)).square().mean(1)

    def move(self, network):
        with torch.no_grad():
            for mine, other in zip(self.teacher.parameters(), network.parameters(), strict=True):
                mine.lerp_(other, 0.2)

    def after_step(self, networks, step):
        self.move(networks["model"])

    def witness(self, networks):
        return self.teacher.state_dict()

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
                self.move(networks["model"])
            loop.test(networks)


class CarriedHidden(Habit):
    """A hidden state that is carried over batches, detached, as an attribute of the module; of the batch's mean."""

    modes = ONE_PROCESS

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.read = nn.GRUCell(4, 6), nn.Linear(6, 1)
            self.hidden = None

        def forward(self, x):
            hidden = torch.zeros(1, 6, dtype=x.dtype) if self.hidden is None else self.hidden
            new = self.cell(x, hidden.expand(len(x), 6))
            if self.training:
                self.hidden = new.detach().mean(0, keepdim=True)
            return self.read(new)

    def network(self):
        return self.Network()


class CarriedPerProcess(CarriedHidden):
    """The same on three processes, each of which carries that of its own part; it comes back in each."""

    modes = (THREE, THREE_RESUMED)
    per_process = True


class Queue(Habit):
    """A queue of the last examples (MoCo's) that is reassigned, and compared with."""

    modes = ONE_PROCESS

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)
            self.register_buffer("queue", torch.zeros(8, 4))

        def forward(self, x):
            answer = self.linear(x) + (x @ self.queue.T).mean(1, keepdim=True)
            if self.training:
                self.queue = torch.cat([x.detach(), self.queue])[:8]
            return answer

    def network(self):
        return self.Network()


class QueueOnThree(Queue):
    """The same on three processes, whose queues hold other examples: the mean is kept, and that is said."""

    modes = (THREE,)
    says = ON_THREE
    limits = {THREE: MEAN}


class WeightDecayInForward(Habit):
    """Weights that the forward pass of training shrinks, in place."""

    class Network(nn.Sequential):
        def forward(self, x):
            if self.training:
                with torch.no_grad():
                    self[0].weight.mul_(0.99)
            return super().forward(x)

    def network(self):
        return self.Network(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


class RenormalisedThroughData(Habit):
    """Weights that are put to norm 1 through `.data` before they are used."""

    class Network(nn.Sequential):
        def forward(self, x):
            self[0].weight.data = self[0].weight.data / self[0].weight.data.norm(dim=1, keepdim=True)
            return super().forward(x)

    def network(self):
        return self.Network(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


class SplitBySizes(Habit):
    """A tensor that is split by sizes computed from another tensor."""

    def loss(self, networks, batch):
        x, y = batch
        sizes = [int((x[:, 0] > 0).sum()), int((x[:, 0] <= 0).sum())]
        order = (x[:, 0] <= 0).to(torch.int8).argsort(stable=True)
        losses = (networks["model"](x) - y).square().mean(1)
        first, second = losses[order].split(sizes)
        return torch.cat([first * 2.0, second * 0.5])


class CodeBook(Habit):
    """Vector quantisation whose code book follows the mean of its inputs by a moving average, in place."""

    modes = (ALONE, ACCUMULATED, RESUMED)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.decode = nn.Linear(4, 2), nn.Linear(2, 1)
            self.register_buffer("codes", torch.randn(4, 2))

        def forward(self, x):
            z = self.encode(x)
            nearest = torch.cdist(z, self.codes.to(z)).argmin(1)
            if self.training:
                with torch.no_grad():
                    for code in range(4):
                        if (nearest == code).any():
                            self.codes[code].lerp_(z[nearest == code].mean(0), 0.1)
            return self.decode(z + (self.codes[nearest] - z).detach())

    def network(self):
        return self.Network()
