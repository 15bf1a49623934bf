"""Handwritten digits classified by two 5x5 convolutions, each followed by pooling
(document 001, part 4).

    accelerate launch launch/train.py recipes/mnist_cnn_pool.py

The document prints no accuracy. Measured: 98.20 % (97.83 to 98.25) on MNIST's
test set after its one epoch, 4.0 s (median and range of 3 seeds, 2026-11-30,
two threads of a 2-core AMD EPYC). With one thread the sums are rounded
otherwise: 97.76 % (97.14 to 97.80).

Differences from the document: its accuracy line never ran (it says so itself)
and its loss line needs a PyTorch before 0.4 (`loss.data[0]`); here all 10,000
test examples count. Its ten printed predictions are printed and drawn here too.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn, optim

from nndist import Classifier, Data, DataConfig, History, Networks, scale_images
from nndist.datasets.mnist import digits


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 5, padding=2)
        self.conv2 = nn.Conv2d(16, 32, 5, padding=2)
        self.output = nn.Linear(32 * 7 * 7, 10)

    def forward(self, x: Tensor) -> Tensor:  # [k, 1, 28, 28]
        x = F.relu(F.max_pool2d(self.conv1(x), 2))  # [k, 16, 14, 14]; pooling first is the same and cheaper
        x = F.relu(F.max_pool2d(self.conv2(x), 2))  # [k, 32, 7, 7]
        return self.output(x.flatten(1))


@dataclass(kw_only=True)
class MnistCNNPool(Classifier):
    """Digit classifier of two convolutions with pooling."""

    document = "001, part 4"
    channels_last = True

    epochs: int = 1
    batch_size: int = 50
    lr: float = 1e-2

    def data(self, config: DataConfig) -> Data:
        return digits(config, scale_images(mean=0.0, std=1.0))

    def networks(self) -> dict[str, nn.Module]:
        return {"model": Net()}

    def optimizer(self, name: str, network: nn.Module) -> optim.Optimizer:
        return optim.Adam(network.parameters(), lr=self.lr, betas=(0.9, 0.999), fused=True)

    def figures(self, networks: Networks, data: Data, history: History) -> dict[str, Any]:
        images, labels = data.inputs(data.test, 0, 10)
        predicted = " ".join(data.classes[number] for number in networks["model"](images).argmax(1).tolist())
        real = " ".join(data.classes[number] for number in labels.tolist())
        text = f"prediction  {predicted}\nreal number {real}"  # as the document prints them
        return {**super().figures(networks, data, history), "first_ten": text}
