"""Learning rates: torch's schedulers, factors by group and network, and schedules by hand."""

import math

import torch
from conformance.habit import ALONE, Habit, TwoNetworks
from torch.optim import lr_scheduler


class Scheduled(Habit):
    """What the habits below share: a scheduler, stepped after each optimizer step or each epoch."""

    modes = ()

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        scheduler = self.scheduler("model", optimizer, 12)
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
                if self.scheduler_every == "step":
                    scheduler.step()
            if self.scheduler_every == "epoch":
                scheduler.step()
            loop.test(networks)


class OneCycle(Scheduled):
    """OneCycleLR, which moves the momentum too."""

    modes = Habit.modes

    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr, momentum=0.9)

    def scheduler(self, name, optimizer, total_steps):
        return lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=total_steps)


class WarmRestarts(Scheduled):
    """CosineAnnealingWarmRestarts."""

    modes = Habit.modes

    def scheduler(self, name, optimizer, total_steps):
        return lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=3, T_mult=2)


class Lambda(Scheduled):
    """LambdaLR, whose function the recipe makes again at a resume."""

    modes = Habit.modes

    def scheduler(self, name, optimizer, total_steps):
        return lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))


class LambdaPerGroup(Lambda):
    """LambdaLR with one function for each group."""

    modes = Habit.modes

    def optimizer(self, name, network):
        groups = [{"params": [p]} for p in network.parameters()]
        return torch.optim.SGD(groups, lr=self.lr)

    def scheduler(self, name, optimizer, total_steps):
        return lr_scheduler.LambdaLR(optimizer, [lambda step, n=n: 1.0 / (1 + n * step) for n in range(4)])


class LambdaThatCounts(Scheduled):
    """LambdaLR, whose function keeps a count of its calls in its closure."""

    modes = Habit.modes

    def scheduler(self, name, optimizer, total_steps):
        calls = [0]

        def factor(step):
            calls[0] += 1
            return 1.0 / calls[0] ** 0.5

        return lr_scheduler.LambdaLR(optimizer, factor)


class StepPerEpoch(Scheduled):
    """MultiStepLR by epochs."""

    modes = Habit.modes
    scheduler_every = "epoch"

    def scheduler(self, name, optimizer, total_steps):
        return lr_scheduler.MultiStepLR(optimizer, [1, 2], gamma=0.3)


class Sequential(Scheduled):
    """SequentialLR of a warm-up and a cosine, whose state has schedulers within."""

    modes = Habit.modes

    def scheduler(self, name, optimizer, total_steps):
        warm = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=4)
        rest = lr_scheduler.CosineAnnealingLR(optimizer, T_max=total_steps - 4)
        return lr_scheduler.SequentialLR(optimizer, [warm, rest], milestones=[4])


class Chained(Scheduled):
    """ChainedScheduler of two."""

    modes = Habit.modes

    def scheduler(self, name, optimizer, total_steps):
        first = lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=6)
        return lr_scheduler.ChainedScheduler([first, lr_scheduler.ExponentialLR(optimizer, gamma=0.9)], optimizer)


class ChainedTensorRate(Chained):
    """The same of a learning rate that is a tensor, which schedulers keep copies of."""

    def optimizer(self, name, network):
        return torch.optim.Adam(network.parameters(), lr=torch.tensor(self.lr, dtype=torch.float32), foreach=False)


class Cyclic(Scheduled):
    """CyclicLR with a scale function of its own."""

    modes = Habit.modes

    def scheduler(self, name, optimizer, total_steps):
        return lr_scheduler.CyclicLR(
            optimizer, 0.01, 0.1, step_size_up=3, cycle_momentum=False, scale_fn=lambda x: 0.5**x, scale_mode="cycle"
        )


class OwnScheduler(Scheduled):
    """A scheduler class of the user's own, derived from LRScheduler, that counts."""

    modes = Habit.modes

    class Wave(lr_scheduler.LRScheduler):
        def __init__(self, optimizer):
            self.turns = 0
            super().__init__(optimizer)

        def get_lr(self):
            self.turns += 1
            return [base * (1.0 + 0.5 * math.sin(self.turns)) for base in self.base_lrs]

    def scheduler(self, name, optimizer, total_steps):
        return self.Wave(optimizer)


class ReduceOnPlateau(Habit):
    """ReduceLROnPlateau, which hears the test loss after each evaluation."""

    def scheduler(self, name, optimizer, total_steps):
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=0.5)

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        scheduler = self.scheduler("model", optimizer, 12)
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
            scheduler.step(loop.test(networks))


class ByHand(Habit):
    """param_groups[0]["lr"] set by the recipe's own hook."""

    def optimizer(self, name, network):
        self.used = super().optimizer(name, network)
        return self.used

    def after_step(self, networks, step):
        self.used.param_groups[0]["lr"] *= 0.9

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
                optimizer.param_groups[0]["lr"] *= 0.9
            loop.test(networks)


class FactorPerGroup(Habit):
    """lr_factor gives one factor for each group: the head is warmed up, the body decays."""

    def optimizer(self, name, network):
        groups = [{"params": network[0].parameters()}, {"params": network[2].parameters(), "lr": self.lr * 2}]
        return torch.optim.Adam(groups, lr=self.lr)

    def lr_factor(self, step, total_steps):
        return [1.0 - step / total_steps, min(1.0, (step + 1) / 4)]

    def train(self, networks, loop):
        optimizer, step = self.optimizer("model", networks["model"]), 0
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.param_groups[0]["lr"] = self.lr * (1.0 - step / 12)
                optimizer.param_groups[1]["lr"] = self.lr * 2 * min(1.0, (step + 1) / 4)
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
                step += 1
            loop.test(networks)


class GroupAddedUnderScheduler(Habit):
    """The rest of the network becomes a group of its own after an epoch, while a scheduler() sets the rates."""

    def optimizer(self, name, network):
        parameters = list(network.parameters())
        self.rest, self.used = parameters[:2], torch.optim.SGD(parameters[2:], lr=self.lr, momentum=0.9)
        return self.used

    def scheduler(self, name, optimizer, total_steps):
        return lr_scheduler.StepLR(optimizer, 2, 0.7)

    def after_epoch(self, networks, epoch):
        if epoch == 1:
            self.used.add_param_group({"params": self.rest, "lr": 0.01, "initial_lr": 0.01})

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        scheduler = lr_scheduler.StepLR(optimizer, 2, 0.7)
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
                scheduler.step()
            self.after_epoch(networks, epoch + 1)
            loop.test(networks)


class GroupAddedUnderOwnScheduler(GroupAddedUnderScheduler):
    """The same, where the recipe steps its own scheduler."""

    def optimizer(self, name, network):
        optimizer = super().optimizer(name, network)
        self.own = lr_scheduler.StepLR(optimizer, 2, 0.7)
        return optimizer

    def scheduler(self, name, optimizer, total_steps):
        return None

    def after_step(self, networks, step):
        self.own.step()

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
                self.own.step()
            self.after_epoch(networks, epoch + 1)
            loop.test(networks)


class EmptyFirstGroup(Scheduled):
    """The first parameter group has no parameters, and a scheduler sets the rates."""

    modes = Habit.modes

    def optimizer(self, name, network):
        return torch.optim.AdamW([{"params": []}, {"params": list(network.parameters())}], lr=self.lr)

    def scheduler(self, name, optimizer, total_steps):
        return lr_scheduler.CosineAnnealingLR(optimizer, total_steps)


class FactorPerNetwork(TwoNetworks):
    """lr_factor gives a factor for the critic only."""

    def lr_factor(self, step, total_steps):
        return {"critic": 1.0 / (1 + step)}

    def train(self, networks, loop):
        optimizers, step = {name: self.optimizer(name, network) for name, network in networks.items()}, 0
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizers["critic"].param_groups[0]["lr"] = self.lr * (1.0 / (1 + step))
                for name, loss in (("critic", self.critic_loss), ("generator", self.generator_loss)):
                    networks[name].zero_grad()
                    loop.backward(loss, networks, batch, name)
                    optimizers[name].step()
                step += 1
            loop.test(networks)


class Cosine(Habit):
    """The schedule of the fields: a warm-up, then a cosine, which the recipe's docstring spells out."""

    def __post_init__(self):
        self.schedule, self.warmup_steps = "cosine", 3

    def train(self, networks, loop):
        optimizer, step = self.optimizer("model", networks["model"]), 0
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                factor = (step + 1) / 3 if step < 3 else 0.5 * (1.0 + math.cos(math.pi * (step - 3) / (12 - 1 - 3)))
                optimizer.param_groups[0]["lr"] = self.lr * factor
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
                step += 1
            loop.test(networks)


class BothSchedules(Habit):
    """A scheduler() beside --schedule."""

    modes = (ALONE,)
    refused = "--schedule cosine: recipe schedules has a scheduler() of its own; leave it out"

    def __post_init__(self):
        self.schedule = "cosine"

    def scheduler(self, name, optimizer, total_steps):
        return lr_scheduler.ExponentialLR(optimizer, gamma=0.9)


class ForeignScheduler(Habit):
    """A scheduler() that gives the scheduler of another optimizer."""

    modes = (ALONE,)
    refused = "scheduler() must return a torch.optim.lr_scheduler of the optimizer of 'model'"

    def scheduler(self, name, optimizer, total_steps):
        other = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        return lr_scheduler.ExponentialLR(other, gamma=0.9)
