"""Seven optimizers compared on one network and one set of points, in lockstep
(document 001, parts 3.6 and 3.7).

    accelerate launch launch/train.py recipes/optimizers.py

The document gives no figure. Measured: mean squared distance from the true
curve SGD 0.047 (0.041 to 0.051), Adagrad 0.0087 (0.0070 to 0.030), Momentum
0.0040 (0.0034 to 0.0051), NAG 0.0040 (0.0032 to 0.0051), Adadelta 0.0033
(0.0017 to 0.0051), RMSprop 0.0025 (0.0018 to 0.0053), Adam 0.0017 (0.0011 to
0.0019), in 0.6 s for all seven (medians and ranges of 3 seeds, 2026-11-30, two
threads of a 2-core AMD EPYC). Medians of 20 seeds, 2026-11-21: SGD 0.045,
Adagrad 0.010, Momentum 0.0035, NAG 0.0033, RMSprop 0.0032, Adadelta 0.0022,
Adam 0.0009. SGD is the slowest and Adam converges well, as the document says.

Differences from the document: it shows no code for this; network, points and
options are the usual ones for it. Adadelta's learning rate is its authors' 1:
it scales a step size that the method chooses, and with the others' 0.01 it
hardly moves (0.093, 5 seeds).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Gt
from torch import Tensor, nn, optim

from nndist import ACTIVATIONS, Activation, Batch, History, Networks, Objective, Recipe, figures
from nndist.data import Data, DataConfig, Resident

OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "sgd": optim.SGD,
    "momentum": partial(optim.SGD, momentum=0.8, fused=True),
    "nag": partial(optim.SGD, momentum=0.8, nesterov=True, fused=True),
    "adagrad": optim.Adagrad,
    "adadelta": optim.Adadelta,
    "rmsprop": partial(optim.RMSprop, alpha=0.9),
    "adam": partial(optim.Adam, betas=(0.9, 0.99), fused=True),
}
LINES = {"nag": "--"}  # it overlaps momentum's


class Net(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.hidden = nn.Linear(1, 20)
        self.predict = nn.Linear(20, 1)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:  # [k, 1]
        x = self.activation(self.hidden(x))  # [k, 20]
        return self.predict(x)  # [k, 1]


@dataclass(kw_only=True)
class Optimizers(Recipe):
    """Seven optimizers compared."""

    document = "001, parts 3.6 and 3.7"
    headline = tuple(f"test/loss/{name}" for name in OPTIMIZERS)

    epochs: int = 12
    batch_size: int = 32
    lr: float = 0.01
    adadelta_lr: Annotated[float, Gt(0)] = 1.0
    """Learning rate of Adadelta, which scales a step size that it chooses itself; its authors use 1."""
    data_seed: int = 0
    """Seed of the generated noise."""
    activation: Activation = "relu"
    """Activation function of the hidden layer."""

    def data(self, config: DataConfig) -> Data:
        generator = torch.Generator().manual_seed(self.data_seed)
        x = torch.linspace(-1, 1, 1000).unsqueeze(1)
        y = x.square() + 0.1 * torch.randn(1000, 1, generator=generator)
        return Data(train=Resident(x, y), test=Resident(x, x.square()), source="generated points")

    def networks(self) -> dict[str, nn.Module]:
        network = Net(ACTIVATIONS[self.activation])
        return {name: copy.deepcopy(network) for name in OPTIMIZERS}

    def optimizer(self, name: str, network: nn.Module) -> optim.Optimizer:
        return OPTIMIZERS[name](network.parameters(), lr=self.adadelta_lr if name == "adadelta" else self.lr)

    def objectives(self) -> dict[str, Objective]:
        return {name: partial(squared_error, name) for name in OPTIMIZERS}

    def score(self, networks: Networks, batch: Batch) -> dict[str, Tensor]:
        return {f"loss/{name}": squared_error(name, networks, batch) for name in networks}

    def figures(self, networks: Networks, data: Data, history: History) -> dict[str, Any]:
        return {
            "optimizers": loss_curves(
                history, f"optimizers on {data.source}: training loss, and its median over 10 records"
            ),
            "fits": fits(networks, data, f"optimizers on {data.source}: the seven fits"),
        }


def squared_error(name: str, networks: Networks, batch: Batch) -> Tensor:
    """The loss of the network called `name`, shape [k]."""
    x, y = batch
    return F.mse_loss(networks[name](x), y, reduction="none").squeeze(1)


def loss_curves(history: History, title: str) -> Any:
    """The training loss of every optimizer, labelled with its last test loss."""
    figure = figures.new_figure(9.0, 5.5)
    axes = figure.add_subplot()
    for name in OPTIMIZERS:
        steps, losses = history.series(f"train/loss/{name}")
        _, tested = history.series(f"test/loss/{name}")
        medians = [median(losses[max(0, end - 10) : end]) for end in range(1, len(losses) + 1)]
        (line,) = axes.plot(steps, medians, LINES.get(name, "-"), label=f"{name}, test loss {tested[-1]:.4f}")
        axes.plot(steps, losses, color=line.get_color(), linewidth=0.5, alpha=0.4)
    axes.axhline(0.01, color="black", linestyle=":", linewidth=1, label="variance of the noise, 0.01")
    axes.set_yscale("log")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("mean squared error")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="upper right", fontsize="small")
    axes.set_title(title)
    return figure


def fits(networks: Networks, data: Data, title: str) -> Any:
    """The points and the curve of every network."""
    (x, y), (test_x, _) = data.inputs(data.train), data.inputs(data.test)
    figure = figures.new_figure(9.0, 5.5)
    axes = figure.add_subplot()
    axes.scatter(x.cpu(), y.cpu(), s=6, color="lightgray", label="data")
    for name, network in networks.items():
        axes.plot(test_x.cpu(), network(test_x).cpu(), LINES.get(name, "-"), label=name)
    axes.set_xlabel("x")
    axes.set_ylabel("y")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", fontsize="small", ncols=2)
    axes.set_title(title)
    return figure
