"""Points on two hills and on a line, and curves of two weights to fit to them: losses that can be drawn."""

import torch
from torch import Tensor

WIDTH = 0.6  # standard deviation of a hill
HILLS = ((1.5, 1.0), (-1.5, 0.6))  # centre and height: one bump covers the higher one or, as a local optimum, the other
LINE = (0.3, 0.5)  # intercept, and slope by x / 4
NOISE = 0.05


def points(seed: int, count: int = 200) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """x from -4 to 4, the hills' and the line's values there, each [count]: with noise of `seed`, and without."""
    x = torch.linspace(-4, 4, count)
    hills = torch.stack([bump(x, *map(torch.tensor, hill)) for hill in HILLS]).sum(0)
    truths = torch.stack([hills, line(x, *map(torch.tensor, LINE))])
    noisy = truths + NOISE * torch.randn(truths.shape, generator=torch.Generator().manual_seed(seed))
    return (x, *noisy), (x, *truths)


def bump(x: Tensor, centre: Tensor, height: Tensor) -> Tensor:
    """A hill's values at x."""
    return height * torch.exp(-0.5 * ((x - centre) / WIDTH) ** 2)


def line(x: Tensor, intercept: Tensor, slope: Tensor) -> Tensor:
    """A line's values at x; its slope is by x / 4, so that both weights matter about equally."""
    return intercept + slope * x / 4


def mean_losses(weights: Tensor, x: Tensor, hills: Tensor, flat: Tensor, *, linear: bool) -> Tensor:
    """The mean squared error at each pair of weights, [..., 2] -> [...], of a bump or of a line (`linear`)."""
    first, second = weights.unsqueeze(-1).unbind(-2)
    fitted, target = (line(x, first, second), flat) if linear else (bump(x, first, second), hills)
    return (fitted - target).square().mean(-1)


def least_squares(x: Tensor, flat: Tensor) -> Tensor:
    """The line's intercept and slope in closed form, [2]."""
    terms = torch.stack([torch.ones_like(x), x / 4], 1)
    return torch.linalg.lstsq(terms, flat.unsqueeze(1)).solution.flatten()


def ends(paths: dict[str, Tensor], x: Tensor, hills: Tensor, flat: Tensor) -> str:
    """Where each path of weights, [steps + 1, 2] by `optimizer_problem`, ends, and after how many steps its loss stays
    within a hundredth of its last, a line each."""
    lines = ["start  optimizer     ends at            loss     steps to within 1 % of it"]
    exact = {"least squares_line": least_squares(x, flat).expand(2, 2)}
    for name, path in (paths | exact).items():
        optimizer, _, problem = name.partition("_")
        along = mean_losses(path, x, hills, flat, linear=problem == "line")
        count = (along > 1.01 * along[-1]).nonzero().flatten()
        end = f"({path[-1][0]:6.3f}, {path[-1][1]:6.3f})  {along[-1]:.5f}"
        lines.append(f"{problem:<6} {optimizer:<14}{end}  {0 if not len(count) else int(count[-1]) + 1:3d}")
    return "\n".join(lines)
