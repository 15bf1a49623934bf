"""The loop by hand, in plain PyTorch: the examples in their order, one network or three copies trained on them.

Of the library it has the order of the examples only.
"""

import random

import numpy
import torch

from nndist.data.sets import permutation


class Loop:
    """The examples of a training in their order, and the losses that are seen on the way."""

    def __init__(self, recipe, data, accumulate=1, seed=0):
        self.recipe, self.data, self.accumulate, self.seed = recipe, data, accumulate, seed
        self.losses: dict[str, list[float]] = {}
        self.scores: list[float] = []

    def batches(self, epoch):
        """The batches of an epoch, each as a list of its micro-batches."""
        tensors = self.data.train.tensors
        order = permutation(len(tensors[0]), self.seed, epoch, self.recipe.shuffle)
        for numbers in order.split(self.recipe.batch_size):
            parts = [part for part in numbers.tensor_split(self.accumulate) if len(part)]
            yield [self.data.prepare(tuple(tensor[part] for tensor in tensors)) for part in parts]

    def backward(self, loss, networks, batch, name="model"):
        """Adds up the gradients of the mean loss over the batch, and gives that mean."""
        if len(batch) == 1:
            mean = loss(networks, batch[0]).mean()
            mean.backward()
            self.losses.setdefault(name, []).append(mean.item())
            return mean.item()
        size = sum(len(part[0]) for part in batch)
        total = 0.0
        for part in batch:
            losses = loss(networks, part)
            part_of_mean = losses.sum() / (size * (losses.numel() // len(losses)))
            part_of_mean.backward()
            total += part_of_mean.item()
        self.losses.setdefault(name, []).append(total)
        return total

    def test(self, networks):
        """The mean score over the test set, which tutorials compute after each epoch."""
        for network in networks.values():
            network.eval()
        with torch.no_grad():
            batch = self.data.prepare(tuple(tensor.clone() for tensor in self.data.test.tensors))
            score = self.recipe.score(networks, batch)["loss"].mean().item()
        for network in networks.values():
            network.train()
        self.scores.append(score)
        return score


class Generators:
    """The states of Python's, NumPy's and torch's generators, of which each process has its own."""

    def __init__(self):
        self.state = random.getstate(), numpy.random.get_state(), torch.get_rng_state()

    def put_back(self):
        random.setstate(self.state[0])
        numpy.random.set_state(self.state[1])
        torch.set_rng_state(self.state[2])


def train_replicas(recipes, networks, loops, generators, optimizers):
    """Data parallelism by hand: copies with states of their own, their gradients added up, then a step of each."""
    main = loops[0]
    count = len(recipes)
    for epoch in range(recipes[0].epochs):
        for (whole,) in main.batches(epoch):
            total = 0.0
            size = len(whole[0])
            parts = list(zip(*(tensor.tensor_split(count) for tensor in whole), strict=True))
            for rank, (recipe, nets, part) in enumerate(zip(recipes, networks, parts, strict=True)):
                generators[rank].put_back()
                nets["model"].zero_grad()
                loss = recipe.loss(nets, part).sum() / size
                loss.backward()
                total += loss.item()
                generators[rank] = Generators()
            main.losses.setdefault("model", []).append(total)
            for copies in zip(*(nets["model"].parameters() for nets in networks), strict=True):
                found = [copy.grad for copy in copies if copy.grad is not None]
                if found:
                    gradient = torch.stack(found).sum(0)
                    for copy in copies:
                        copy.grad = gradient.clone()
            for optimizer in optimizers:
                optimizer.step()
        scores = []
        shares = [tensor.tensor_split(count) for tensor in main.data.test.tensors]
        for rank, (recipe, nets) in enumerate(zip(recipes, networks, strict=True)):
            nets["model"].eval()
            with torch.no_grad():
                scores.append(recipe.score(nets, tuple(share[rank] for share in shares))["loss"])
            nets["model"].train()
        main.scores.append(torch.cat(scores).mean().item())
