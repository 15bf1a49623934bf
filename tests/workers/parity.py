"""Called by test_parity in 1, 2 and 3 processes: trains several recipes and says which examples each step took."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

import nndist
from nndist.data import Data, Resident
from nndist.metrics import Weighted
from nndist.recipe import Recipe, load_recipe

NUM_STEPS = 14
ROOT = Path(__file__).parent.parent.parent
Simple = load_recipe(ROOT / "recipes/mnist_simple_cnn.py")


@dataclass(kw_only=True)
class Watched(Simple):
    """The documented CNN, with every example's number in its batch."""

    double: bool = True
    """Train in float64: in fp32 a rounding error may tip a ReLU or a maximum over, which then grows a thousandfold."""

    seen: ClassVar[list] = []

    def data(self, config):
        data = super().data(config)
        scale = data.prepare
        data.train = Resident(*data.train.tensors, torch.arange(len(data.train)))

        def prepare(batch):
            images, labels = scale(batch[:2])
            return images.double() if self.double else images, labels, *batch[2:]

        data.prepare = prepare
        return data

    def networks(self):
        networks = super().networks()
        return {name: network.double() if self.double else network for name, network in networks.items()}

    def loss(self, networks, batch):
        images, labels, numbers = batch
        type(self).seen.append(numbers.tolist())
        return F.cross_entropy(networks["model"](images), labels, reduction="none")


@dataclass(kw_only=True)
class Narrow(Watched):
    """The same layers with fewer channels, since float64 is slow; the linear ones still fill two of DDP's buckets.

    Of 500 images, so that the steps go over the end of an epoch, with a last batch of 50 or 52.
    """

    def data(self, config):
        data = super().data(config)
        data.train = Resident(*(tensor[:500] for tensor in data.train.tensors))
        data.test = Resident(*(tensor[:200] for tensor in data.test.tensors))
        return data

    def networks(self):
        convolutions = (nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.MaxPool2d(2))
        linear = (nn.Flatten(), nn.Linear(16 * 5 * 5, 400), nn.ReLU(), nn.Linear(400, 10))
        return {"model": nn.Sequential(*convolutions, *linear).double()}


@dataclass(kw_only=True)
class TinyGAN(Recipe):
    """Two networks with BatchNorm that train against each other on 2-D points; its noise is part of the data."""

    epochs: int = 1
    lr: float = 0.01
    batch_size: int = 50
    clip_norm: float | None = field(default=1.0)

    def data(self, config):
        generator = torch.Generator().manual_seed(1)
        points = torch.randn(1010, 2, generator=generator).double() * 0.3 + 1.0
        noise = torch.randn(1010, 4, generator=generator).double()
        return Data(train=Resident(points, noise), test=Resident(points[:101], noise[:101]))

    def networks(self):
        def mlp(inputs, outputs):
            return nn.Sequential(nn.Linear(inputs, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, outputs)).double()

        return {"discriminator": mlp(2, 1), "generator": mlp(4, 2)}

    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr, momentum=0.5)

    def objectives(self):
        return {"discriminator": self.discriminator_loss, "generator": self.generator_loss}

    def discriminator_loss(self, networks, batch):
        real, noise = batch
        judged_real = networks["discriminator"](real)
        judged_fake = networks["discriminator"](networks["generator"](noise).detach())
        ones = torch.ones_like(judged_real)
        real_loss = F.binary_cross_entropy_with_logits(judged_real, ones, reduction="none")
        fake_loss = F.binary_cross_entropy_with_logits(judged_fake, 0 * ones, reduction="none")
        return (real_loss + fake_loss).squeeze(1)

    def generator_loss(self, networks, batch):
        judged = networks["discriminator"](networks["generator"](batch[1]))
        return F.binary_cross_entropy_with_logits(judged, torch.ones_like(judged), reduction="none").squeeze(1)

    def score(self, networks, batch):
        return {"realness": torch.sigmoid(networks["discriminator"](networks["generator"](batch[1]))).squeeze(1)}


@dataclass(kw_only=True)
class Sequences(Recipe):
    """Next-token prediction over sequences of 1 to 9 tokens, padded to 9; what stands in the padding is infinite."""

    epochs: int = 2
    lr: float = 0.5
    batch_size: int = 20
    clip_norm: float | None = 0.3

    def data(self, config):
        generator = torch.Generator().manual_seed(2)
        tokens = torch.randint(0, 5, (101, 10), generator=generator)
        lengths = torch.randint(1, 10, (101,), generator=generator)
        lengths[:20] = 1  # a process may hold short ones only
        return Data(train=Resident(tokens, lengths), test=Resident(tokens[:31], lengths[:31]))

    def networks(self):
        return {"model": NextToken().double()}

    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr)

    def loss(self, networks, batch):
        tokens, lengths = batch
        logits = networks["model"](tokens[:, :-1])
        counted = torch.arange(9) < lengths.unsqueeze(1)
        losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        return Weighted(losses.where(counted, torch.inf), counted)

    def score(self, networks, batch):
        return {"loss": self.loss(networks, batch), "length": batch[1].double()}


class NextToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.read = nn.Linear(8, 5)

    def forward(self, tokens):
        return self.read(self.lstm(self.embed(tokens))[0])


def plain_sequences() -> tuple[dict[str, torch.Tensor], float]:
    """The weights that a plain loop over the same examples gives, and its last evaluation."""
    from nndist.data import permutation
    from nndist.distributed.runtime import Runtime

    recipe = Sequences()
    data = recipe.data(None)
    Runtime.seed(None, 0)  # as the loop does before it makes the networks
    networks = recipe.networks()
    optimizer = recipe.optimizer("model", networks["model"])
    for epoch in range(recipe.epochs):
        for index in permutation(101, 0, epoch).split(recipe.batch_size):
            losses, counted = recipe.loss(networks, tuple(tensor[index] for tensor in data.train.tensors))
            losses[counted].mean().backward()
            nn.utils.clip_grad_norm_(networks["model"].parameters(), recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
    losses, counted = recipe.loss(networks, data.test.tensors)
    return networks["model"].state_dict(), losses[counted].mean().item()


def main(folder: str | Path) -> None:
    folder = Path(folder)
    common = {
        "data_source": "sample",
        "progress": False,
        "runs_dir": folder,
        "timeout_seconds": 60,
        "figures": False,
        "report": False,
        "threads": 1,
    }
    outcomes = {}
    for batch_size in (64, 50):
        for accumulate in (1, 3):
            Watched.seen.clear()
            name = f"batch{batch_size}-accumulate{accumulate}"
            settings = {"max_steps": NUM_STEPS, "accumulate": accumulate, "run": name, "seed": 3}
            result = nndist.train(Narrow(batch_size=batch_size), **settings, **common)
            seen = list(Watched.seen)
            outcomes[name] = {"seen": seen, "scores": result.scores, "history": result.history.records}
    outcomes["outputs"] = result.history.outputs["logits"].tolist()
    nndist.train(Watched(double=False), max_steps=8, run="fp32", seed=0, **common)
    for gradient_sync in ("step", "ddp"):
        for accumulate in (1, 3):
            settings = {"max_steps": NUM_STEPS, "accumulate": accumulate, "seed": 3, "gradient_sync": gradient_sync}
            recipe = Narrow(batch_size=50, clip_norm=1.0, schedule="cosine")
            nndist.train(recipe, run=f"{gradient_sync}-accumulate{accumulate}", **settings, **common)
    for accumulate in (1, 2):
        # with accumulation each micro-batch is normalised by itself, so only the runs without it are compared
        result = nndist.train(TinyGAN(), accumulate=accumulate, run=f"gan{accumulate}", seed=3, **common)
        state = {
            f"{n}.{k}": v.double().sum().item()
            for n, net in result.networks.items()
            for k, v in net.state_dict().items()
        }
        outcomes[f"gan{accumulate}"] = {"scores": result.scores, "sums": state}
    # a last batch of two examples: of 3 processes one has none and must still take part
    result = nndist.train(TinyGAN(batch_size=1008), run="remainder", seed=3, **common)
    outcomes["remainder"] = {"scores": result.scores, "sums": {}}
    for accumulate in (1, 2):
        name = f"sequences{accumulate}"
        result = nndist.train(Sequences(), accumulate=accumulate, run=name, log_every=2, **common)
        outcomes[name] = {"scores": result.scores, "history": result.history.records}
    outcomes["sequences_plain"] = plain_sequences()[1]
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    (folder / f"outcomes-{rank}.json").write_text(json.dumps(outcomes))
