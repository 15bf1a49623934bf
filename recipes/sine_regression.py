"""A curve fitted to 100 noisy points of x sin(2 pi x) by a 1-10-1 network
(document 000, section 3).

    accelerate launch launch/train.py recipes/sine_regression.py
    accelerate launch launch/train.py recipes/sine_regression.py --fast

The document gives no figure. Measured: mean squared distance from the true
curve 0.055 (0.030 to 0.056), 6.7 s (median and range of 3 seeds, 2026-11-30,
two threads of a 2-core AMD EPYC). Mean of 10 seeds 0.048, 0.030 to 0.056
(2026-11-21); the best constant has 0.136. With `--fast` 0.038 (10 seeds, 0.012
to 0.055, 2026-11-21), 1.2 s: 2,000 steps in place of 50,000.

Differences from the document: its learning rate is 0.1, with a momentum of 0.9
in effect a rate of 1 along the gradient of each noisy example. With `--lr 0.1`
all hidden units died with each of 10 seeds, and of 10 data seeds, and the fit
is a flat line (no NaN; 1.65 from the curve, wherever the last example left it).
So the learning rate here is 0.001. The text says that it uses no activation
function; its code has the ReLU used here. The test set is new.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from nndist import ACTIVATIONS, Activation, Batch, Data, DataConfig, History, Networks, Recipe, Resident, figures
from nndist.recipe import Fraction

FAST = {"batch_size": 50, "epochs": 1000, "lr": 0.1, "shuffle": True, "schedule": "cosine"}


class Net(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Linear(1, 10)
        self.fc2 = nn.Linear(10, 1)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:  # [k, 1]
        x = self.activation(self.fc1(x))  # [k, 10]
        return self.fc2(x)  # [k, 1]


@dataclass(kw_only=True)
class SineRegression(Recipe):
    """Curve through noisy points of x sin(2 pi x)."""

    document = "000, section 3"

    epochs: int = 500
    batch_size: int = 1
    lr: float = 1e-3
    shuffle: bool = False
    evaluate_every: str = "50 epochs"
    momentum: Fraction = 0.9
    """Momentum of SGD."""
    data_seed: int = 0
    """Seed of the generated points."""
    activation: Activation = "relu"
    """Activation function of the hidden layer."""
    fast: bool = False
    """An equally good fit in 1/25 of the steps: batches of 50, 1,000 epochs, shuffled, lr 0.1 with a cosine to 0."""

    def __post_init__(self) -> None:
        if self.fast:
            for name, value in FAST.items():  # flags given explicitly stay
                if getattr(self, name) == getattr(type(self), name):
                    setattr(self, name, value)

    def data(self, config: DataConfig) -> Data:
        generator = torch.Generator().manual_seed(self.data_seed)
        x = torch.rand(100, 1, generator=generator)
        y = curve(x) + 0.4 * torch.randn(100, 1, generator=generator)
        test_x = torch.arange(0, 1, 0.01).unsqueeze(1)
        return Data(train=Resident(x, y), test=Resident(test_x, curve(test_x)), source="generated points")

    def networks(self) -> dict[str, nn.Module]:
        return {"model": Net(ACTIVATIONS[self.activation])}

    def optimizer(self, name: str, network: nn.Module) -> optim.Optimizer:
        return optim.SGD(network.parameters(), lr=self.lr, momentum=self.momentum, fused=True)

    def loss(self, networks: Networks, batch: Batch) -> Tensor:
        x, y = batch
        return F.mse_loss(networks["model"](x), y, reduction="none").squeeze(1)

    def figures(self, networks: Networks, data: Data, history: History) -> dict[str, Any]:
        (x, y), (test_x, test_y) = data.inputs(data.train), data.inputs(data.test)
        figure = figures.new_figure()
        axes = figure.add_subplot()
        axes.plot(test_x.cpu(), test_y.cpu(), color="black", linestyle="--", linewidth=1.2, label="x sin(2 pi x)")
        figures.fitted_curve(axes, x, y, test_x, networks["model"](test_x))
        figure.suptitle(f"sine_regression on {data.source}: 100, with noise of standard deviation 0.4")
        return {"fit": figure}


def curve(x: Tensor) -> Tensor:
    """The function to fit."""
    return x * torch.sin(2 * math.pi * x)
