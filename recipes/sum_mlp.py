"""The sum of thirty numbers by a 30-60-60-1 network (document 003).

    accelerate launch launch/train.py recipes/sum_mlp.py

The document prints a loss of 0.0000 after 3,000 steps and ten errors of 0.00.
Measured: test loss 0.0000087 (0.0000053 to 0.000019) and absolute error 0.0020
(0.0016 to 0.0022), 0.9 s (medians and ranges of 3 seeds, 2026-11-30, two
threads of a 2-core AMD EPYC). Medians of 20 seeds 0.000012 and 0.0022; 19 are
below 0.00005, one is at 0.0018 (2026-11-21). The table of ten predictions is
figures/predictions.txt.

Differences from the document: it ends in a ReLU; if that outputs 0 for every
input, there is no gradient and nothing is ever learned. Of 1,000 networks built
and trained as the document says (in plain PyTorch), 236 start so and 162 end
so, at a loss of 228, the mean square of the sums; of 20 seeds of this recipe
with `--last-relu`, 1 (of 20 other seeds, 3). So here the last layer has none,
and 0 of 20 fail. The 96,000 examples are generated before training, not step by
step; each is still seen once.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from nndist import ACTIVATIONS, Activation, Answers, Batch, Count, History, Inputs, Networks, Recipe, figures
from nndist.data import Data, DataConfig, Resident, Tensors


class Net(nn.Module):
    def __init__(self, activation: nn.Module, last_relu: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(30, 60)
        self.fc2 = nn.Linear(60, 60)
        self.fc3 = nn.Linear(60, 1)
        self.activation = activation
        self.last_relu = last_relu

    def forward(self, x: Tensor) -> Tensor:  # [k, 30]
        x = self.activation(self.fc1(x))  # [k, 60]
        x = self.activation(self.fc2(x))
        x = self.fc3(x)  # [k, 1]
        return F.relu(x) if self.last_relu else x


@dataclass(kw_only=True)
class SumMLP(Recipe):
    """Sum of thirty numbers."""

    document = "003"
    documented = "loss 0.0000"
    headline = ("test/loss", "test/absolute_error")

    batch_size: int = 32
    lr: float = 1e-3
    shuffle: bool = False
    evaluate_every: str = "500 steps"
    steps: Count = 3000
    """Optimizer steps per epoch, each on new examples."""
    data_seed: int = 0
    """Seed of the generated examples."""
    activation: Activation = "relu"
    """Activation function of the hidden layers."""
    last_relu: bool = False
    """End in a ReLU, like the document; about one seed in six then never learns."""

    def data(self, config: DataConfig) -> Data:
        generator = torch.Generator().manual_seed(self.data_seed)
        sizes = (1000, self.steps * self.batch_size)  # the test set first, so that it does not depend on --steps
        test, train = (torch.randint(101, (n, 30), generator=generator, dtype=torch.uint8) for n in sizes)
        return Data(train=Resident(train), test=Resident(test), source="generated numbers", prepare=with_sums)

    def networks(self) -> dict[str, nn.Module]:
        return {"model": Net(ACTIVATIONS[self.activation], self.last_relu)}

    def optimizer(self, name: str, network: nn.Module) -> optim.Optimizer:
        return optim.Adam(network.parameters(), lr=self.lr, fused=True)

    def loss(self, networks: Networks, batch: Batch) -> Tensor:
        inputs, sums = batch
        return F.mse_loss(networks["model"](inputs), sums, reduction="none").squeeze(1)

    def score(self, networks: Networks, batch: Batch) -> dict[str, Tensor]:
        inputs, sums = batch
        errors = (networks["model"](inputs) - sums).squeeze(1)
        return {"loss": errors.square(), "absolute_error": errors.abs()}

    def figures(self, networks: Networks, data: Data, history: History) -> dict[str, Any]:
        inputs, sums = data.inputs(data.test)
        predicted = networks["model"](inputs)
        return {
            "predictions": table(inputs[:10], predicted[:10], sums[:10]),
            "errors": errors_by_sum(predicted, sums, f"sum_mlp on {data.source}: {len(sums):,} test examples"),
        }

    def predict(self, networks: Networks, inputs: Inputs) -> Answers:
        """The sum of thirty numbers from 0 to 100."""
        return Answers({"sum": 100 * networks["model"](inputs.batch()[0]).squeeze(1)})


def with_sums(batch: Tensors) -> Tensors:
    """Numbers 0 to 100, uint8 [k, 30] -> numbers / 100, float [k, 30], and their sums, [k, 1]."""
    inputs = batch[0].to(torch.float32).div_(100)
    return inputs, inputs.sum(1, keepdim=True)


def table(inputs: Tensor, predicted: Tensor, sums: Tensor) -> str:
    """The document's test table: the first five of the thirty numbers, prediction, target, absolute error."""
    lines = [f"{'':<4} {'numbers / 100':<40} {'predicted':>9} {'target':>9} {'error':>9}"]
    for number, (row, p, t) in enumerate(zip(inputs.cpu(), predicted.cpu(), sums.cpu(), strict=True), 1):
        shown = "[" + ", ".join(f"{value:.2f}" for value in row[:5].tolist()) + ", ...]"
        lines.append(f"{number:<4} {shown:<40} {p.item():>9.4f} {t.item():>9.4f} {(p - t).abs().item():>9.4f}")
    return "\n".join(lines)


def errors_by_sum(predicted: Tensor, sums: Tensor, title: str) -> Any:
    """Predictions and their errors against the true sums, all [k, 1]."""
    x, y = sums.cpu().flatten(), predicted.cpu().flatten()
    figure = figures.new_figure(9.0, 4.2)
    left, right = figure.subplots(1, 2)
    left.plot(x, x, color="tab:gray", linewidth=1, label="predicted = true")
    left.scatter(x, y, s=8, alpha=0.6, label="test examples")
    left.set_ylabel("predicted sum")
    left.legend(loc="best", fontsize="small")
    right.axhline(0, color="tab:gray", linewidth=1)
    right.scatter(x, y - x, s=8, alpha=0.6)
    right.set_ylabel("predicted - true sum")
    for axes in (left, right):
        axes.set_xlabel("true sum of the thirty numbers / 100")
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    return figure
