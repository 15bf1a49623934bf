"""Optimizers of torch's, with closures, and of a user's own; what tutorials do around `step`."""

import torch
from conformance.habit import ALONE, MODES, Habit
from torch import nn
from torch.optim.swa_utils import AveragedModel


def of_torch(kind, **options):
    """A habit that uses one of torch's optimizers."""

    class Uses(Habit):
        def optimizer(self, name, network):
            return getattr(torch.optim, kind)(network.parameters(), lr=self.lr, **options)

    return Uses


class Adam(of_torch("Adam", amsgrad=True, weight_decay=0.01)):
    """Adam with amsgrad."""


class AdamW(of_torch("AdamW", maximize=True)):
    """AdamW that climbs."""


class Momentum(of_torch("SGD", momentum=0.9, dampening=0.1)):
    """SGD with momentum, whose first step is another one."""


class FusedSGD(of_torch("SGD", momentum=0.9, nesterov=True, fused=True)):
    """torch's fused kernel."""


class RMSprop(of_torch("RMSprop", momentum=0.5, centered=True)):
    """RMSprop, centred."""


class Rprop(of_torch("Rprop")):
    """Rprop, whose state has each weight's step."""


class ASGD(of_torch("ASGD", t0=5)):
    """Averaged SGD, whose state has tensors of numbers of steps."""


class RAdam(of_torch("RAdam", decoupled_weight_decay=True)):
    """RAdam."""


class Adafactor(of_torch("Adafactor")):
    """Adafactor."""


class Muon(Habit):
    """torch.optim.Muon, which orthogonalises updates of matrices; the biases are frozen."""

    def network(self):
        return nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 1, bias=False))

    def optimizer(self, name, network):
        return torch.optim.Muon(network.parameters(), lr=self.lr)


class LBFGS(Habit):
    """LBFGS through its closure, over the whole batch."""

    rounding_on_three = 1e-6  # its line search magnifies what rounding leaves

    def __post_init__(self):
        self.batch_size = 40
        self.epochs = 12
        self.evaluate_every = "4 epochs"

    def optimizer(self, name, network):
        return torch.optim.LBFGS(
            network.parameters(), lr=0.3, max_iter=4, history_size=5, line_search_fn="strong_wolfe"
        )

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                first = []

                def closure(batch=batch, first=first):
                    optimizer.zero_grad()
                    first.append(loop.backward(self.loss, networks, batch))
                    return torch.tensor(first[-1], dtype=torch.float64)

                optimizer.step(closure)
                loop.losses["model"][-len(first) :] = first[:1]
            if epoch % 4 == 3:
                loop.test(networks)


class LBFGSByABias(LBFGS):
    """LBFGS of a network whose first parameter is a bias: its state is one vector of all parameters."""

    def network(self):
        network = super().network()
        nn.utils.parametrizations.weight_norm(network[0])
        return network


class MyMomentum(torch.optim.Optimizer):
    """A user's own class, with tensors and numbers as its state."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["steps"], state["velocity"] = 0, torch.zeros_like(parameter)
                state["steps"] += 1
                state["velocity"].mul_(0.9).add_(parameter.grad)
                parameter.add_(state["velocity"], alpha=-group["lr"] / state["steps"] ** 0.5)


class OwnOptimizer(Habit):
    """An optimizer class of the user's own, with state for each parameter."""

    def optimizer(self, name, network):
        return MyMomentum(network.parameters(), self.lr)


class Lookahead(torch.optim.Optimizer):
    """Slow weights beside the fast ones of another optimizer, and a counter, all attributes of its own."""

    def __init__(self, inner, every=3):
        self.inner, self.every, self.count = inner, every, 0
        super().__init__(inner.param_groups, {})
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.param_groups = self.param_groups
        self.inner.step()
        self.count += 1
        if self.count % self.every == 0:
            fast = [p for group in self.param_groups for p in group["params"]]
            for slow, parameter in zip(self.slow, fast, strict=True):
                slow.lerp_(parameter, 0.5)
                parameter.copy_(slow)


class OptimizerWithinOptimizer(Habit):
    """Lookahead around Adam, which keeps its state in attributes rather than in `state`."""

    def optimizer(self, name, network):
        return Lookahead(torch.optim.Adam(network.parameters(), lr=self.lr))


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation: a second pass at the weights moved uphill; its step must be given a closure."""

    def __init__(self, parameters, inner, radius=0.05, **defaults):
        super().__init__(parameters, {"radius": radius, **defaults})
        self.inner = inner(self.param_groups, **defaults)

    def step(self, closure):
        closure = torch.enable_grad()(closure)
        loss = closure()
        moved = []
        with torch.no_grad():
            found = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            norm = torch.stack([p.grad.norm() for p in found]).norm()
            for parameter in found:
                uphill = parameter.grad * (self.param_groups[0]["radius"] / (norm + 1e-12))
                parameter.add_(uphill)
                moved.append((parameter, uphill))
        closure()
        with torch.no_grad():
            for parameter, uphill in moved:
                parameter.sub_(uphill)
        self.inner.step()
        return loss


class SharpnessAware(Habit):
    """SAM, as a class whose `step(closure)` takes two passes, around plain SGD."""

    says = dict.fromkeys(MODES, "SAM.step(closure) finds no gradients when it begins")

    def optimizer(self, name, network):
        return SAM(network.parameters(), torch.optim.SGD, lr=self.lr)

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                first = []

                def closure(batch=batch, first=first):
                    optimizer.zero_grad()
                    first.append(loop.backward(self.loss, networks, batch))
                    return torch.tensor(first[-1], dtype=torch.float64)

                optimizer.step(closure)
                loop.losses["model"][-len(first) :] = first[:1]
            loop.test(networks)


class SAMAfterBackward(torch.optim.Optimizer):
    """davda54's SAM: `step(closure)` starts from the gradients of `loss.backward()`."""

    def __init__(self, parameters, inner, radius=0.05, **defaults):
        super().__init__(parameters, {"radius": radius, **defaults})
        self.inner = inner(self.param_groups, **defaults)
        self.param_groups = self.inner.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is not None, "Sharpness Aware Minimization requires closure, but it was not provided"
        found = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in found]).norm()
        for parameter in found:
            self.state[parameter]["old"] = parameter.clone()
            parameter.add_(parameter.grad * (self.param_groups[0]["radius"] / (norm + 1e-12)))
        self.zero_grad()
        torch.enable_grad()(closure)()
        for parameter in found:
            parameter.data = self.state[parameter]["old"]
        self.inner.step()


class SharpnessAwareAfterBackward(Habit):
    """SAM as its README has it: `loss.backward()`, then `step(closure)`."""

    closure_after_backward = ("model",)

    def optimizer(self, name, network):
        return SAMAfterBackward(network.parameters(), torch.optim.SGD, lr=self.lr, momentum=0.9)

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):

                def closure(batch=batch):
                    loop.backward(self.loss, networks, batch)
                    loop.losses["model"].pop()

                loop.backward(self.loss, networks, batch)
                optimizer.step(closure)
                optimizer.zero_grad()
            loop.test(networks)


class SharpnessAwareUndeclared(Habit):
    """The same, without a word in the recipe."""

    modes = (ALONE,)
    refused = (
        "the optimizer of 'model', SAMAfterBackward, needs a closure: if it starts from the gradients of "
        "loss.backward(), as SAM does, write closure_after_backward = ('model',) in the recipe's class; else let its "
        "step(self, closure) have no default"
    )

    def optimizer(self, name, network):
        return SAMAfterBackward(network.parameters(), torch.optim.SGD, lr=self.lr)


class CountingZeroGrad(torch.optim.Optimizer):
    """Its steps depend on the calls of `zero_grad`, on a number among its defaults, and on private names."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr, "steps": 0})
        self._optimizer_zeroed = self._need_more = 0

    def zero_grad(self, set_to_none=True):
        self._optimizer_zeroed += 1
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure=None):
        self.defaults["steps"] += 1
        self._need_more += self.defaults["steps"] % 3 == 0
        for parameter in self.param_groups[0]["params"]:
            shorter = 1 + self._optimizer_zeroed + self._need_more + self.defaults["steps"]
            parameter.add_(parameter.grad, alpha=-self.param_groups[0]["lr"] / shorter**0.5)


class OwnZeroGrad(Habit):
    """An optimizer with a `zero_grad` of its own, that counts in private attributes and in its defaults."""

    def optimizer(self, name, network):
        return CountingZeroGrad(network.parameters(), self.lr)


class SwitchedOptimizer(Habit):
    """The recipe puts another optimizer into its attribute after an epoch, which nothing would ever step."""

    modes = (ALONE,)
    stops = "used has become another optimizer, SGD, by step 4, and the run keeps that which optimizer() returned"

    def optimizer(self, name, network):
        self.used = torch.optim.Adam(network.parameters(), lr=self.lr)
        return self.used

    def after_epoch(self, networks, epoch):
        self.used = torch.optim.SGD(networks["model"].parameters(), lr=0.2)


class Groups(Habit):
    """Two groups of parameters, of which the biases have no decay and ten times the rate."""

    def optimizer(self, name, network):
        weights = [p for p in network.parameters() if p.dim() > 1]
        biases = [p for p in network.parameters() if p.dim() == 1]
        groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": self.lr * 10, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.lr)


class TensorRate(Habit):
    """A learning rate that is a tensor, under a schedule."""

    def optimizer(self, name, network):
        return torch.optim.Adam(network.parameters(), lr=torch.tensor(self.lr, dtype=torch.float64), foreach=False)


class Clipped(Habit):
    """clip_norm, as clip_grad_norm_ between backward and step."""

    def __post_init__(self):
        self.clip_norm = 0.5

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                nn.utils.clip_grad_norm_(networks["model"].parameters(), 0.5)
                optimizer.step()
            loop.test(networks)


class ClippedByValue(Habit):
    """clip_grad_value_ in before_update: of the gradients of the whole batch."""

    def before_update(self, name, network):
        nn.utils.clip_grad_value_(network.parameters(), 0.1)

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                self.before_update("model", networks["model"])
                optimizer.step()
            loop.test(networks)


class AverageOfWeights(Habit):
    """torch's AveragedModel (SWA), updated in after_epoch and kept as an attribute of the recipe."""

    def networks(self):
        networks = super().networks()
        self.averaged = AveragedModel(networks["model"])
        return networks

    def after_epoch(self, networks, epoch):
        self.averaged.update_parameters(networks["model"])

    def witness(self, networks):
        return self.averaged.state_dict()

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
            self.averaged.update_parameters(networks["model"])
            loop.test(networks)


class WeightsClipped(Habit):
    """Weights that after_step clips and normalises."""

    def after_step(self, networks, step):
        with torch.no_grad():
            for parameter in networks["model"].parameters():
                parameter.clamp_(-0.3, 0.3)

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
                self.after_step(networks, 0)
            loop.test(networks)


class RestartedOptimizer(Habit):
    """Momentum that after_epoch throws away, by clearing the optimizer's state."""

    def optimizer(self, name, network):
        self.used = torch.optim.Adam(network.parameters(), lr=self.lr)
        return self.used

    def after_epoch(self, networks, epoch):
        self.used.state.clear()

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
            optimizer.state.clear()
            loop.test(networks)


class CountingStep(Habit):
    """`step` patched on the optimizer's instance, by a closure that counts: every third step is twice as long."""

    def optimizer(self, name, network):
        optimizer, count = super().optimizer(name, network), [0]
        step = optimizer.step

        def patched(closure=None):
            count[0] += 1
            optimizer.param_groups[0]["lr"] = self.lr * (2.0 if count[0] % 3 == 0 else 1.0)
            return step(closure)

        optimizer.step = patched
        return optimizer


class NotAnOptimizer(Habit):
    """optimizer() gives a list."""

    modes = (ALONE,)
    refused = "optimizer() returns a list for 'model'; it must return a torch.optim.Optimizer"

    def optimizer(self, name, network):
        return [super().optimizer(name, network)]
