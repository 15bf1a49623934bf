"""Nine ways down a loss: where each ends depends on where it starts (document
001, parts 1.2, 3.6 and 3.7).

    accelerate launch launch/train.py recipes/descent.py

Measured: mean squared distance from the hills 0.132 from the left, where all
nine end in the local optimum, and 0.048 from the right, where they end in the
global one, the same to these digits with each of 3 seeds, 0.9 s (median;
2026-11-30, two threads of a 2-core AMD EPYC). Steps until the training loss
stays within 1 % of its last, from the right: Newton 3, LBFGS 4, Adagrad 9, NAG
15, momentum 25, gradient descent 26, Adadelta 46, Adam 53, RMSprop 15 to 75 (3
seeds of the noise). A line has one optimum, which least squares gives in closed
form: Newton is there in 1 step, LBFGS in 4, gradient descent in 22.

Differences from the document: it names Newton's method, least squares and
gradient descent, and says that the start decides whether the global or a local
optimum is found, without an example. Data, model and options are chosen here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn, optim

from nndist import Answers, Batch, Data, DataConfig, History, Inputs, Networks, Objective, Recipe, Resident, figures
from nndist.datasets.hills import bump, ends, least_squares, line, mean_losses, points
from nndist.training.newton import Newton

STARTS = {"left": (-0.6, 1.5), "right": (0.6, 1.5), "line": (-0.6, 1.5)}
OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "gd": partial(optim.SGD, lr=0.3),  # SGD on all examples at once
    "momentum": partial(optim.SGD, lr=0.3, momentum=0.8),
    "nag": partial(optim.SGD, lr=0.3, momentum=0.8, nesterov=True),
    "adagrad": partial(optim.Adagrad, lr=0.3),
    "adadelta": partial(optim.Adadelta, lr=10.0),
    "rmsprop": partial(optim.RMSprop, lr=0.05, alpha=0.9),
    "adam": partial(optim.Adam, lr=0.1),
    "lbfgs": partial(optim.LBFGS, lr=1.0, max_iter=1, line_search_fn="strong_wolfe"),
    "newton": Newton,
}


class Curve(nn.Module):
    """Two weights: the centre and the height of a bump, or for `line` the intercept and the slope of a line."""

    def __init__(self, problem: str) -> None:
        super().__init__()
        self.problem = problem
        self.weights = nn.Parameter(torch.tensor(STARTS[problem]))

    def forward(self, x: Tensor) -> Tensor:  # [k]
        return (line if self.problem == "line" else bump)(x, *self.weights)


@dataclass(kw_only=True)
class Descent(Recipe):
    """Nine ways down a loss."""

    document = "001, parts 1.2, 3.6 and 3.7"
    headline = ("test/loss/left", "test/loss/right")

    epochs: int = 80
    batch_size: int = 200
    lr: float = 1.0
    """Factor on the learning rate of each optimizer."""
    evaluate_every: str = "1 steps"
    data_seed: int = 0
    """Seed of the generated noise."""

    def data(self, config: DataConfig) -> Data:
        train, test = (Resident(*tensors) for tensors in points(self.data_seed))
        return Data(train=train, test=test, source="generated points")

    def networks(self) -> dict[str, nn.Module]:
        return {f"{name}_{problem}": Curve(problem) for problem in STARTS for name in OPTIMIZERS}

    def optimizer(self, name: str, network: nn.Module) -> optim.Optimizer:
        optimizer = OPTIMIZERS[name.partition("_")[0]](network.parameters())
        optimizer.param_groups[0]["lr"] *= self.lr
        return optimizer

    def objectives(self) -> dict[str, Objective]:
        return {name: partial(squared_error, name) for name in self.networks()}

    def score(self, networks: Networks, batch: Batch) -> dict[str, Tensor]:
        errors = {name: squared_error(name, networks, batch) for name in networks}
        groups = {start: [error for name, error in errors.items() if name.endswith(start)] for start in STARTS}
        return {f"loss/{start}": torch.stack(group).mean(0) for start, group in groups.items()}

    def snapshot(self, networks: Networks, data: Data) -> dict[str, Tensor]:
        return {name: network.weights.detach().clone() for name, network in networks.items()}  # type: ignore[operator]

    def figures(self, networks: Networks, data: Data, history: History) -> dict[str, Any]:
        steps = [{name: torch.tensor(STARTS[name.partition("_")[2]]) for name in networks}]
        steps += [{name: weights.cpu() for name, weights in tensors.items()} for _, tensors in history.snapshots]
        paths = {name: torch.stack([tensors[name] for tensors in steps]) for name in networks}  # [steps + 1, 2]
        batch = tuple(tensor.cpu() for tensor in data.inputs(data.train))
        return {"paths": drawn_paths(paths, batch, f"descent on {data.source}"), "ends": ends(paths, *batch)}

    def predict(self, networks: Networks, inputs: Inputs) -> Answers:
        x = inputs.rows(1).squeeze(1)
        return inputs.measured({"hills": networks["newton_right"](x), "line": networks["newton_line"](x)})


def squared_error(name: str, networks: Networks, batch: Batch) -> Tensor:
    """The loss of the network called `name`, shape [k]."""
    return (networks[name](batch[0]) - batch[2 if name.endswith("line") else 1]).square()


def drawn_paths(paths: dict[str, Tensor], batch: Batch, title: str) -> Any:
    """The contours of each loss and the optimizers' paths on it, and how fast they find the line."""
    figure = figures.new_figure(13.0, 9.0)
    axes = dict(zip((*STARTS, "speed"), figure.subplots(2, 2).flat, strict=True))
    exact = least_squares(batch[0], batch[2])
    a, b = torch.linspace(-3, 3, 121), torch.linspace(-0.6, 1.9, 101)
    for problem, panel in list(axes.items())[:3]:
        heights = mean_losses(torch.cartesian_prod(a, b), *batch, linear=problem == "line").reshape(121, 101)
        panel.contourf(a, b, heights.T.sqrt(), 24, cmap="Greys", alpha=0.6)
        for number, (name, path) in enumerate((n, p) for n, p in paths.items() if n.endswith(problem)):
            label, style = name.partition("_")[0], {"color": f"C{number}", "linewidth": 1.3}
            panel.plot(*path.T, label=label, **style)
            panel.plot(*path[-1], "o", color=f"C{number}", markersize=5)
            if problem == "line":
                above = mean_losses(path, *batch, linear=True) - mean_losses(exact, *batch, linear=True)
                axes["speed"].plot(above.clamp_min(1e-9), label=label, **style)
        panel.plot(*STARTS[problem], "k*", markersize=14, label="start")
        panel.set(xlabel="centre of the bump", ylabel="height of the bump", title=f"a bump, from the {problem}")
    axes["line"].plot(*exact, "rx", markersize=14, markeredgewidth=3, label="least squares")
    axes["line"].set(xlabel="intercept", ylabel="slope", title="a line: one minimum, from anywhere")
    axes["speed"].set(xlabel="step", ylabel="loss above that of least squares", yscale="log", title="a line: how fast")
    axes["speed"].grid(alpha=0.3)
    axes["line"].legend(fontsize="small", loc="lower right")
    figure.suptitle(f"{title}: two minima, the higher hill's at (1.5, 1) is the global one", fontsize=11)
    return figure
