"""Several networks that are trained against each other or share parts."""

import itertools

import torch
import torch.nn.functional as F
from conformance.habit import ALONE, ONE_PROCESS, RESUMED, THREE, THREE_RESUMED, Habit, TwoNetworks
from torch import nn


class GAN(TwoNetworks):
    """A discriminator's and a generator's step in turn."""


class GANWithBatchNorm(TwoNetworks):
    """The same with BatchNorm in both, whose statistics each pass updates."""

    def networks(self):
        def mlp(inputs, outputs):
            return nn.Sequential(nn.Linear(inputs, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, outputs)).double()

        return {"critic": mlp(2, 1), "generator": mlp(3, 2)}


class RequiresGradToggled(TwoNetworks):
    """The generator's loss sets requires_grad of the discriminator to False, its own loss to True, as tutorials do."""

    def critic_loss(self, networks, batch):
        networks["critic"].requires_grad_(True)
        return super().critic_loss(networks, batch)

    def generator_loss(self, networks, batch):
        networks["critic"].requires_grad_(False)
        return super().generator_loss(networks, batch)


class WassersteinClipped(TwoNetworks):
    """WGAN: n_critic 3 by objectives_of_step, and the critic's weights clipped in after_step."""

    def objectives_of_step(self, step):
        return {"critic", "generator"} if step % 3 == 2 else {"critic"}

    def critic_loss(self, networks, batch):
        real, noise = batch
        return (networks["critic"](networks["generator"](noise).detach()) - networks["critic"](real)).squeeze(1)

    def generator_loss(self, networks, batch):
        return -networks["critic"](networks["generator"](batch[1])).squeeze(1)

    def after_step(self, networks, step):
        for parameter in networks["critic"].parameters():
            parameter.data.clamp_(-0.1, 0.1)

    def optimizer(self, name, network):
        return torch.optim.RMSprop(network.parameters(), lr=0.01)

    def train(self, networks, loop):
        optimizers, step = {name: self.optimizer(name, network) for name, network in networks.items()}, 0
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizers["critic"].zero_grad()
                loop.backward(self.critic_loss, networks, batch, "critic")
                optimizers["critic"].step()
                if step % 3 == 2:
                    optimizers["generator"].zero_grad()
                    loop.backward(self.generator_loss, networks, batch, "generator")
                    optimizers["generator"].step()
                for parameter in networks["critic"].parameters():
                    parameter.data.clamp_(-0.1, 0.1)
                step += 1
            loop.test(networks)


class GradientPenalty(WassersteinClipped):
    """WGAN-GP: the penalty differentiates twice, by torch.autograd.grad with create_graph."""

    def critic_loss(self, networks, batch):
        real, noise = batch
        fake = networks["generator"](noise).detach()
        between = ((real + fake) / 2).requires_grad_(True)
        with torch.enable_grad():
            judged = networks["critic"](between)
        (slope,) = torch.autograd.grad(judged.sum(), between, create_graph=True)
        penalty = (slope.norm(dim=1) - 1.0).square()
        return (networks["critic"](fake) - networks["critic"](real)).squeeze(1) + 10.0 * penalty


class SharedTrunk(Habit):
    """Two heads with their own optimizers on one trunk, a module of both networks."""

    def networks(self):
        trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        return {name: nn.Sequential(trunk, nn.Linear(6, 1)).double() for name in ("one", "two")}

    def objectives(self):
        return {"one": self.one, "two": self.two}

    def one(self, networks, batch):
        return (networks["one"](batch[0]) - batch[1]).square().squeeze(1)

    def two(self, networks, batch):
        return (networks["two"](batch[0]) + batch[1]).abs().squeeze(1)

    def score(self, networks, batch):
        return {"loss": self.one(networks, batch)}

    def optimizer(self, name, network):
        return torch.optim.Adam(network.parameters(), lr=self.lr)

    def train(self, networks, loop):
        optimizers = {name: self.optimizer(name, network) for name, network in networks.items()}
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                for name, loss in (("one", self.one), ("two", self.two)):
                    optimizers[name].zero_grad()
                    loop.backward(loss, networks, batch, name)
                    optimizers[name].step()
            loop.test(networks)


class WholeInOne(Habit):
    """One network that is a part of another: the encoder is trained by its own objective and within the autoencoder."""

    def networks(self):
        encoder = nn.Linear(4, 2)
        return {"whole": nn.Sequential(encoder, nn.Tanh(), nn.Linear(2, 4)).double(), "encoder": encoder}

    def objectives(self):
        return {"whole": self.rebuild, "encoder": self.shrink}

    def rebuild(self, networks, batch):
        return (networks["whole"](batch[0]) - batch[0]).square().mean(1)

    def shrink(self, networks, batch):
        return networks["encoder"](batch[0]).square().mean(1)

    def score(self, networks, batch):
        return {"loss": self.rebuild(networks, batch)}

    def train(self, networks, loop):
        optimizers = {name: self.optimizer(name, network) for name, network in networks.items()}
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                for name, loss in (("whole", self.rebuild), ("encoder", self.shrink)):
                    optimizers[name].zero_grad()
                    loop.backward(loss, networks, batch, name)
                    optimizers[name].step()
            loop.test(networks)


class HelperNetwork(Habit):
    """A frozen network beside the trained one, which has no objective: features to be matched."""

    def networks(self):
        helper = nn.Sequential(nn.Linear(1, 3), nn.Tanh()).double().requires_grad_(False)
        return {"model": self.network().double(), "features": helper}

    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr, weight_decay=0.1)

    def loss(self, networks, batch):
        x, y = batch
        features = networks["features"]
        return (features(networks["model"](x)) - features(y)).square().mean(1)


class UntrainedBeside(HelperNetwork):
    """The same, but nobody has frozen the helper: no objective names it, so it stays."""

    def networks(self):
        networks = super().networks()
        networks["features"].requires_grad_(True)
        return networks


class PartsCalled(TwoNetworks):
    """Objectives that call parts of networks and their parameters themselves, not the networks."""

    def generator_loss(self, networks, batch):
        generator = networks["generator"]
        hidden = F.linear(batch[1], generator[0].weight, generator[0].bias).tanh()
        return F.softplus(-networks["critic"](generator[2](hidden))).squeeze(1)


class AlternatingByEpoch(TwoNetworks):
    """Objectives that take turns by epoch."""

    def objectives_of_step(self, step):
        return ["critic"] if step // 4 % 2 == 0 else ["generator"]

    def train(self, networks, loop):
        optimizers = {name: self.optimizer(name, network) for name, network in networks.items()}
        for epoch in range(self.epochs):
            name = ("critic", "generator")[epoch % 2]
            for batch in loop.batches(epoch):
                networks[name].zero_grad()
                loop.backward(
                    {"critic": self.critic_loss, "generator": self.generator_loss}[name], networks, batch, name
                )
                optimizers[name].step()
            loop.test(networks)


class DeepQ(Habit):
    """A target network that is set to the trained one at every fifth step by after_step, in networks()."""

    def networks(self):
        target = self.network().double().requires_grad_(False)
        return {"model": self.network().double(), "target": target}

    def loss(self, networks, batch):
        x, y = batch
        with torch.no_grad():
            wanted = y + 0.9 * networks["target"](x.roll(1, 1))
        return (networks["model"](x) - wanted).square().squeeze(1)

    def after_step(self, networks, step):
        if step % 5 == 0:
            networks["target"].load_state_dict(networks["model"].state_dict())

    def train(self, networks, loop):
        optimizer, steps = self.optimizer("model", networks["model"]), itertools.count(1)
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
                if next(steps) % 5 == 0:
                    networks["target"].load_state_dict(networks["model"].state_dict())
            loop.test(networks)


class FrozenTeacher(Habit):
    """Distillation: a teacher with BatchNorm, put in evaluation mode where it is made, as by its own statistics."""

    def networks(self):
        def mlp():
            return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()

        return {"model": mlp(), "teacher": mlp().requires_grad_(False).eval()}

    def loss(self, networks, batch):
        x, y = batch
        answer = networks["model"](x)
        return ((answer - y).square() + (answer - networks["teacher"](x)).square()).mean(1)

    def witness(self, networks):
        return {"seen": networks["teacher"][1].num_batches_tracked}

    def train(self, networks, loop):
        optimizer = self.optimizer("model", networks["model"])
        networks["teacher"].eval()
        for epoch in range(self.epochs):
            networks["model"].train()
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
            loop.test(networks)
            networks["teacher"].eval()


class EvaluatedInInitialWeights(FrozenTeacher):
    """The same where initial_weights(), which a resumed run skips, puts the teacher in evaluation mode."""

    def networks(self):
        networks = super().networks()
        networks["teacher"].train()
        return networks

    def initial_weights(self, networks):
        networks["teacher"].eval()


class FrozenTeacherOnRecipe(FrozenTeacher):
    """The same with the teacher as an attribute of the recipe: in evaluation mode it is alike on all processes."""

    def networks(self):
        networks = super().networks()
        self.teacher = networks.pop("teacher")
        return networks

    def loss(self, networks, batch):
        return super().loss({**networks, "teacher": self.teacher}, batch)

    def witness(self, networks):
        return self.teacher.state_dict()

    def train(self, networks, loop):
        super().train({**networks, "teacher": self.teacher}, loop)


class CentreOnRecipe(Habit):
    """A loss that is a module with a moving average of the answers, as DINO's centre, in a list of the recipe's."""

    says = dict.fromkeys((THREE, THREE_RESUMED), "recipe.losses[0]: changed by each process's own examples")
    limits = {THREE: "return it in networks(), without an objective"}

    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("centre", torch.zeros(1).double())

        def forward(self, answers, y):
            losses = (answers - 0.5 * self.centre - y).square().mean(1)
            self.centre = self.centre * 0.8 + answers.detach().mean(0) * 0.2
            return losses

    def __post_init__(self):
        self.losses = [self.Centred()]

    def loss(self, networks, batch):
        x, y = batch
        return self.losses[0](networks["model"](x), y)

    def score(self, networks, batch):
        return {"loss": super().loss(networks, batch)}

    def witness(self, networks):
        return self.losses[0].state_dict()


class GeneratorKept(TwoNetworks):
    """The fake examples of the critic's pass are kept on the recipe and judged again in the generator's."""

    modes = (ALONE, RESUMED)

    def critic_loss(self, networks, batch):
        real, noise = batch
        self.fake = networks["generator"](noise)
        return (F.softplus(-networks["critic"](real)) + F.softplus(networks["critic"](self.fake.detach()))).squeeze(1)

    def generator_loss(self, networks, batch):
        fake = self.fake if networks["generator"].training else networks["generator"](batch[1])
        return F.softplus(-networks["critic"](fake)).squeeze(1)


class UnknownObjective(TwoNetworks):
    """An objective of a name that no network has."""

    modes = ONE_PROCESS[:1]
    refused = "objective 'judge' has no network of that name; networks() returns critic, generator"

    def objectives(self):
        return {"judge": self.critic_loss}
