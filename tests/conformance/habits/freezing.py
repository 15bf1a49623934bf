"""Parameters that are frozen and unfrozen: by a loss, by epoch, by hooks; and gradients that hooks look at."""

import torch
from conformance.habit import ACCUMULATED, MODES, THREE, THREE_RESUMED, Habit
from torch import nn


def freeze(module, frozen):
    for parameter in module.parameters():
        parameter.requires_grad_(not frozen)


class FrozenByLoss(Habit):
    """The loss freezes a layer after six calls, and thaws it after nine."""

    calls = 0

    def loss(self, networks, batch):
        if networks["model"].training:
            self.calls += 1
            freeze(networks["model"][0], 6 < self.calls <= 9)
        return super().loss(networks, batch)


class ThawedByFlag(Habit):
    """--freeze and --unfreeze-at, with an optimizer of what needs a gradient, as tutorials make it."""

    says = dict.fromkeys(MODES, "frozen until step 4: 2 of 4 tensors")

    def __post_init__(self):
        self.freeze, self.unfreeze_at = ("0",), "1 epoch"

    def optimizer(self, name, network):
        return torch.optim.SGD(filter(lambda p: p.requires_grad, network.parameters()), lr=self.lr, momentum=0.9)

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        for epoch in range(self.epochs):
            freeze(networks["model"][0], epoch == 0)
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
            loop.test(networks)


class Wrapper(torch.optim.Optimizer):
    """Steps another optimizer, whose groups it shares."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure=None):
        return self.inner.step(closure)


class ScaledWrapped(Habit):
    """--lr-scale of an optimizer that is wrapped, which reads its own groups."""

    says = dict.fromkeys(MODES, "learning rate x 0.1: 2 tensors")

    def __post_init__(self):
        self.lr_scale = ("2=0.1",)

    def optimizer(self, name, network):
        return Wrapper(torch.optim.SGD(network.parameters(), lr=self.lr, momentum=0.9))

    def train(self, networks, loop):
        model = networks["model"]
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": self.lr * 0.1}]
        optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=0.9)
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
            loop.test(networks)


class UnfrozenByEpoch(Habit):
    """Frozen at first and thawed after an epoch, as in fine-tuning; the optimizer holds all from the start."""

    def network(self):
        network = super().network()
        freeze(network[0], True)
        return network

    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr, momentum=0.9, weight_decay=0.1)

    def after_epoch(self, networks, epoch):
        if epoch == 1:
            freeze(networks["model"][0], False)

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
            if epoch == 0:
                freeze(networks["model"][0], False)
            loop.test(networks)


class FrozenAfterSteps(Habit):
    """A layer that is frozen in the middle of an epoch, with momentum left over."""

    def optimizer(self, name, network):
        return torch.optim.Adam(network.parameters(), lr=self.lr, weight_decay=0.01)

    def after_step(self, networks, step):
        freeze(networks["model"][2], step >= 6)

    def train(self, networks, loop):
        optimizer, step = self.optimizer("model", networks["model"]), 0
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
                step += 1
                freeze(networks["model"][2], step >= 6)
            loop.test(networks)


class AddedLater(Habit):
    """Trained from the second epoch on by add_param_group; at first the optimizer does not hold it."""

    def network(self):
        network = super().network()
        freeze(network[0], True)
        return network

    def optimizer(self, name, network):
        self.used = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=self.lr)
        return self.used

    def unfreeze(self, network, optimizer):
        freeze(network[0], False)
        optimizer.add_param_group({"params": list(network[0].parameters()), "lr": self.lr / 10})

    def after_epoch(self, networks, epoch):
        if epoch == 1:
            self.unfreeze(networks["model"], self.used)

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
            if epoch == 0:
                self.unfreeze(networks["model"], optimizer)
            loop.test(networks)


class OnlyHeadInOptimizer(Habit):
    """An optimizer that holds the last layer only, though the others have gradients too."""

    def optimizer(self, name, network):
        return torch.optim.SGD(network[2].parameters(), lr=self.lr)


class FrozenBatchNorm(Habit):
    """BatchNorm kept in evaluation mode while the rest trains, by an overridden `train`."""

    class Network(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[1].eval()
            return self

    def network(self):
        return self.Network(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


class FrozenBatchNormByType(Habit):
    """BatchNorms that the loss sets to evaluation mode, found by type and by the name of their class."""

    def network(self):
        layers = nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)
        return nn.Sequential(nn.Linear(4, 8), *layers)

    def loss(self, networks, batch):
        found = [module for module in networks["model"].modules() if type(module) is nn.BatchNorm1d]
        found[0].eval()
        named = [m for m in networks["model"].modules() if m.__class__.__name__ == "BatchNorm1d"]
        named[1].eval()
        return super().loss(networks, batch)


class NoGradientForSome(Habit):
    """A branch that is used by every second call only: at the others its parameters have no gradient."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 1), nn.Linear(4, 1)
            self.calls = 0

        def forward(self, x):
            self.calls += self.training
            return self.first(x) + (self.second(x) if self.calls % 2 else 0.0)

    def network(self):
        return self.Network()

    def optimizer(self, name, network):
        return torch.optim.AdamW(network.parameters(), lr=self.lr)


class ModuleForwardHook(Habit):
    """A forward hook that changes what a layer gives, and counts."""

    def network(self):
        network, calls = super().network(), [0]

        def hook(module, inputs, output):
            calls[0] += 1
            return output * (1.0 + 0.05 * calls[0])

        network[0].register_forward_hook(hook)
        return network


class ForwardPreHook(Habit):
    """A forward pre-hook that rescales the input, as weight normalisers have it."""

    def network(self):
        network = super().network()
        network.register_forward_pre_hook(lambda module, inputs: (inputs[0] * module[0].weight.detach().norm(),))
        return network


HOOKS_ON_THREE = dict.fromkeys((THREE, THREE_RESUMED), "gradient hooks see each process's part of a batch")


class BackwardPreHook(Habit):
    """A full backward pre-hook on a layer that halves the gradient."""

    says = HOOKS_ON_THREE

    def network(self):
        network = super().network()
        network[1].register_full_backward_pre_hook(lambda module, gradients: (gradients[0] * 0.5,))
        return network


class BackwardHook(Habit):
    """A full backward hook that clips what flows on, example by example."""

    says = HOOKS_ON_THREE

    def network(self):
        network = super().network()
        network[1].register_full_backward_hook(lambda m, inputs, outputs: (inputs[0].clamp(-0.001, 0.001),))
        return network


class TensorHook(Habit):
    """A hook on an activation, registered in the forward pass."""

    class Network(nn.Sequential):
        def forward(self, x):
            hidden = self[0](x)
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: gradient * 0.3)
            return self[2](self[1](hidden))

    def network(self):
        return self.Network(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


GRADIENT_LINE = "has a gradient hook, which would see each process's own gradient and not the global batch's"
PART_LINE = "has a gradient hook, which would see each micro-batch's own gradient and not the global batch's"
HOOKS = {ACCUMULATED: PART_LINE, THREE: GRADIENT_LINE, THREE_RESUMED: GRADIENT_LINE}


class ParameterHook(Habit):
    """A hook on a parameter that clips its gradient; on three processes it would see a part of it."""

    refused = HOOKS

    def network(self):
        network = super().network()
        network[0].weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
        return network


class AccumulateGradHook(Habit):
    """register_post_accumulate_grad_hook normalises each gradient as soon as it is there."""

    refused = HOOKS

    def network(self):
        network = super().network()

        def hook(parameter):
            parameter.grad.div_(parameter.grad.norm() + 1.0)

        for parameter in network.parameters():
            parameter.register_post_accumulate_grad_hook(hook)
        return network


class LinearHook(Habit):
    """A parameter's hook that scales, which is the same of parts and of the whole: still refused of parts."""

    refused = HOOKS

    def network(self):
        network = super().network()
        network[2].bias.register_hook(lambda gradient: gradient * 2.0)
        return network


class RequiresGradByHook(Habit):
    """A forward pre-hook that freezes the layer at every third call."""

    def network(self):
        network, calls = super().network(), {"n": 0}

        def hook(module, inputs):
            calls["n"] += module.training
            freeze(module, calls["n"] % 3 == 0)

        network[0].register_forward_pre_hook(hook)
        return network


class GradientCentralised(Habit):
    """`step` patched on the optimizer's instance, which centralises the gradients first."""

    def optimizer(self, name, network):
        optimizer = super().optimizer(name, network)
        step = optimizer.step

        def centralised(closure=None):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None and parameter.grad.dim() > 1:
                        parameter.grad.sub_(parameter.grad.mean(1, keepdim=True))
            return step(closure)

        optimizer.step = centralised
        return optimizer


class OptimizerHooks(Habit):
    """register_step_pre_hook and register_step_post_hook: gradients clipped by value, weights rounded."""

    def optimizer(self, name, network):
        optimizer = super().optimizer(name, network)

        def before(optimizer, arguments, named):
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad.clamp_(-0.05, 0.05)

        def after(optimizer, arguments, named):
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.data.mul_(0.99)

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        return optimizer
