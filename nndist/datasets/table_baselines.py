"""What simple methods reach on a table, beside a network: a constant, a linear model, gradient-boosted trees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nndist import figures

RIDGE = 1e-3


def features(x: Tensor, num_numbers: int, sizes: Sequence[int], train: Tensor) -> Tensor:
    """x as columns for a linear model: standardised numbers, their gaps, categories one-hot; float64.

    train: x of the training lines, whose means and deviations are used.
    """
    mean = train[:, :num_numbers].double().nanmean(0).nan_to_num()
    known = train[:, :num_numbers].double() - mean
    std = known.square().nanmean(0).sqrt().nan_to_num().clamp_min(1e-9)
    numbers = (x[:, :num_numbers].double() - mean) / std
    columns = [numbers.nan_to_num(), numbers.isnan().double(), torch.ones(len(x), 1, dtype=torch.float64)]
    columns += [F.one_hot(x[:, num_numbers + n].long(), size).double() for n, size in enumerate(sizes)]
    return torch.cat(columns, 1)


def linear(train: Tensor, y: Tensor, test: Tensor, num_classes: int) -> Tensor:
    """The test lines' logits of a logistic regression, or values of a ridge regression if num_classes is 0."""
    if not num_classes:
        eye = RIDGE * len(train) * torch.eye(train.shape[1], dtype=train.dtype)
        return test @ torch.linalg.solve(train.T @ train + eye, train.T @ y.double())
    weight = torch.zeros(train.shape[1], num_classes, dtype=train.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(train @ weight, y) + RIDGE * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return test @ weight.detach()


def boosted(train: Tensor, y: Tensor, test: Tensor, num_classes: int, num_numbers: int) -> Tensor | None:
    """The test lines' classes or values by scikit-learn's gradient boosting, at its defaults; None without it."""
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    except ImportError:
        return None
    # it takes at most 255 categories in a column
    categorical = [n for n in range(num_numbers, train.shape[1]) if int(train[:, n].max()) < 255]
    kind = HistGradientBoostingClassifier if num_classes else HistGradientBoostingRegressor
    model = kind(categorical_features=categorical or None, random_state=0)
    model.fit(train.numpy(), y.flatten().numpy())
    return torch.from_numpy(model.predict(test.numpy()))


def compared(
    said: Tensor,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    num_numbers: int,
    sizes: Sequence[int],
    name: str,
) -> str:
    """A table of the network and the baselines on the test lines. said: its logits, or values [k, 1]; all on the CPU.

    Of classes the share that is right; of numbers the root-mean-square error, the mean absolute error and the share of
    the variance that is explained (R2), in the target's unit.
    """
    (x, y), (test_x, test_y) = train, test
    num_classes = 0 if y.is_floating_point() else said.shape[1]
    wide, wide_test = (features(part, num_numbers, sizes, x) for part in (x, test_x))
    by_line = linear(wide, y, wide_test, num_classes)
    by_trees = boosted(x, y, test_x, num_classes, num_numbers)
    rows: dict[str, Tensor | None]
    if num_classes:
        most = y.bincount().argmax()
        rows = {"majority": most.expand_as(test_y), "logistic regression": by_line.argmax(1)}
        rows |= {"gradient boosting": by_trees, name: said.argmax(1)}
        lines = [f"{'right, of the test lines':<26}{len(test_y):>8,}"]
    else:
        rows = {
            "mean": y.double().mean().expand_as(test_y),
            "linear": by_line,
            "gradient boosting": by_trees,
            name: said,
        }
        lines = [f"{'':<22}{'RMSE':>12}{'MAE':>12}{'R2':>9}"]
    for which, answers in rows.items():
        if answers is None:
            lines.append(f"{which:<22}needs scikit-learn: pip install scikit-learn")
        elif num_classes:
            lines.append(f"{which:<26}{(answers == test_y).double().mean():>8.1%}")
        else:
            off = answers.double().flatten() - test_y.double().flatten()
            explained = 1 - off.square().mean() / test_y.double().var(correction=0).clamp_min(1e-300)
            lines.append(f"{which:<22}{off.square().mean().sqrt():>12.5g}{off.abs().mean():>12.5g}{explained:>9.3f}")
    return "\n".join(lines)


def estimates(said: Tensor, true: Tensor, title: str, target: str) -> Any:
    """The estimated values of the test lines against the true ones, both [k, 1] on the CPU."""
    figure = figures.new_figure(5.5, 5.5)
    axes = figure.add_subplot(title=title, xlabel=f"true {target}", ylabel=f"estimated {target}")
    low, high = min(said.min(), true.min()).item(), max(said.max(), true.max()).item()
    axes.plot([low, high], [low, high], color="tab:gray", linewidth=1)
    axes.scatter(true.flatten(), said.flatten(), s=9, alpha=0.5)
    axes.grid(alpha=0.3)
    return figure
