"""A curve through 100 noisy points of x sin(2 pi x) by a 1-10-1 network (document 000, section 3).

    accelerate launch launch/train.py recipes/sine_regression.py
    accelerate launch launch/train.py recipes/sine_regression.py --fast

FILL
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from nndist import figures
from nndist.data import Data, Resident
from nndist.datasets import DataConfig
from nndist.recipe import Batch, Networks, Recipe
from nndist.tracking import History

ACTIVATIONS = {"relu": nn.ReLU(), "sigmoid": nn.Sigmoid(), "tanh": nn.Tanh(), "softplus": nn.Softplus()}
FAST = {"batch_size": 20, "epochs": 200}


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
    lr: float = 0.1
    shuffle: bool = False
    evaluate_every: str = "50 epochs"
    momentum: float = 0.9
    """Momentum of SGD."""
    data_seed: int = 0
    """Seed of the generated points."""
    activation: Literal["relu", "sigmoid", "tanh", "softplus"] = "relu"
    """Activation function of the hidden layer."""
    fast: bool = False
    """As good a fit in a fraction of the time: FILL, where these are not given."""

    def __post_init__(self) -> None:
        if self.fast:
            for name, value in FAST.items():
                if getattr(self, name) == getattr(type(self), name):
                    setattr(self, name, value)

    def data(self, config: DataConfig) -> Data:
        generator = torch.Generator().manual_seed(self.data_seed)
        x = torch.rand(100, 1, generator=generator)
        y = curve(x) + 0.4 * torch.randn(100, 1, generator=generator)
        test_x = torch.arange(0, 1, 0.01).unsqueeze(1)
        return Data(train=Resident(x, y), test=Resident(test_x, curve(test_x)))

    def networks(self) -> dict[str, nn.Module]:
        return {"model": Net(ACTIVATIONS[self.activation])}

    def optimizer(self, name: str, network: nn.Module) -> optim.Optimizer:
        return optim.SGD(network.parameters(), lr=self.lr, momentum=self.momentum)

    def loss(self, networks: Networks, batch: Batch) -> Tensor:
        x, y = batch
        return F.mse_loss(networks["model"](x), y, reduction="none").squeeze(1)

    def figures(self, networks: Networks, data: Data, history: History) -> dict[str, Any]:
        test_x, test_y = data.inputs(data.test)
        figure = figures.new_figure()
        axes = figure.add_subplot()
        axes.plot(test_x.cpu(), test_y.cpu(), color="black", linestyle="--", linewidth=1.2, label="x sin(2 pi x)")
        figures.fitted_curve(axes, *data.inputs(data.train), test_x, networks["model"](test_x))
        figure.suptitle(f"sine_regression: 100 points with noise of 0.4 ({data.source}) and the fit")
        return {"fit": figure}


def curve(x: Tensor) -> Tensor:
    """The function that is to be found."""
    return x * torch.sin(2 * math.pi * x)
