"""Exact means: sums and counts over each example once, all-reduced once per record."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import UserError

NO_FLOAT64 = {"mps"}
"""Types of devices that have no float64 (Apple's GPUs): what is summed exactly is summed on the CPU then."""


def summable(values: Tensor) -> Tensor:
    """The values on a device that can sum them in float64: their own, or the CPU, for which it waits."""
    return values.cpu() if values.device.type in NO_FLOAT64 else values


class Weighted(NamedTuple):
    """Values with weights, such as the losses of sequences of different lengths, padded to one.

    values: [k] or [k, ...] for k examples. weights: the same shape; 0 or False for padding. Those of losses are
    constants: if they need a gradient, it is a UserError.
    The mean is sum(values * weights) / sum(weights) over the whole global batch or set, however it is split.
    """

    values: Tensor
    weights: Tensor

    def per_example(self) -> Weighted:
        """Each example's sum of weighted values and of weights, float64 [k]; values of weight 0 may be nan or inf."""
        weights = summable(self.weights).double()
        products = torch.where(weights != 0, summable(self.values.detach()).double() * weights, 0.0)
        return Weighted(products.reshape(len(products), -1).sum(1), weights.reshape(len(weights), -1).sum(1))


def checked(given: Any, count: int, what: str, kind: str, tensors: Callable[[], Iterable[Tensor]]) -> Tensor:
    """The values that a recipe returned for `count` examples, weighted or not, of shape [count] or [count, ...].

    what, kind: whose they are and what each is called, such as "objective 'model'" and "loss", for the UserError raised
    if they are invalid. tensors: those of the batch that they were computed from.
    """
    values = given.values if isinstance(given, Weighted) else given
    if not isinstance(values, Tensor):
        raise UserError(f"{what}: returns a {type(values).__name__}; it must return a tensor of one {kind} per example")
    if values.dim() == 0 or len(values) != count:
        first = next(iter(tensors()), None)
        if values.dim() > 0 and first is not None and first.shape[:1] == values.shape[:1]:
            raise UserError(
                f"{what}: returns a {kind} of shape {tuple(values.shape)} for {count} examples, as long as the batch's "
                "first tensor: `collate`, or what prepares the batch, must keep each example once (leave some out of "
                f"the dataset, or give them the weight 0, nndist.Weighted), and of several rows return one {kind} per "
                "example"
            )
        raise UserError(
            f"{what}: returns a {kind} of shape {tuple(values.shape)} for {count} examples; it must return one {kind} "
            "per example (with reduction='none'), the loop takes the mean"
        )
    if isinstance(given, Weighted) and given.weights.shape != values.shape:
        raise UserError(
            f"{what}: weights of shape {tuple(given.weights.shape)} for values of shape {tuple(values.shape)}; they "
            "must have the same shape"
        )
    return values


def per_example(values: Tensor | Weighted) -> Tensor | Weighted:
    """Values [k] as they are; others, [k, ...] or weighted, reduced to one per example, float64 [k]."""
    if isinstance(values, Weighted):
        return values.per_example()
    return values if values.dim() == 1 else summable(values).flatten(1).double().mean(1)


def figure_of_batch(values: Tensor) -> Tensor:
    """Whether all k examples of a batch have one value, as if it were a figure of the batch, and which: float32 [3].

    1 if they have, else 0; the value; the value negated. Infinity stands for none, and for 0 and 1, which many examples
    have, such as right answers. The least over several batches has the lowest and the highest, negated.
    """
    low, high = summable(values.detach()).double().aminmax()
    is_figure = (low == high) & (low != 0) & (low != 1)
    least = [(low == high).double(), *(torch.where(is_figure, value, math.inf) for value in (low, -high))]
    return torch.stack(least).float()


class Forms:
    """What the values of each loss or score are, which must be the same for every batch on every process.

    by_name: None for `Weighted` ones, which may be padded; else how many values each example has, 1 for shape [k].
    """

    def __init__(self) -> None:
        self.by_name: dict[str, int | None] = {}

    def check(self, name: str, what: str, given: Tensor | Weighted) -> None:
        """Raises UserError, which begins with `what`, if a batch's values differ in form from those of the first."""
        form = None if isinstance(given, Weighted) else given.numel() // len(given)
        first = self.by_name.setdefault(name, form)
        if form != first:
            raise UserError(_clash(what, first, form))

    def check_others(self, everyones: Iterable[Mapping[str, int | None]], what: str) -> None:
        """Raises UserError, on all processes, if the values of one differ in form from another's."""
        firsts: dict[str, int | None] = {}
        for of_process in everyones:
            for name, form in of_process.items():
                if firsts.setdefault(name, form) != form:
                    raise UserError(_clash(f"{what} {name!r}", firsts[name], form))


def _clash(what: str, one: int | None, other: int | None) -> str:
    if one is None or other is None:
        return (
            f"{what}: returns Weighted for some batches and a plain tensor for others: return Weighted always, with "
            "weights 0 where nothing counts"
        )
    return (
        f"{what}: returns {one} values per example for one batch and {other} for another: if they are padded, return "
        "nndist.Weighted(values, mask), which leaves the padding out; else one mean per example, "
        "values.flatten(1).mean(1)"
    )


MAX_OUTPUTS = 10_000
"""The number of examples of a test set whose outputs an evaluation keeps, for figures."""


class Output(NamedTuple):
    """A network's outputs for k examples, [k, ...]: returned among the scores, they are kept for the figures.

    They have no mean; `History.outputs` has those of the last evaluation's test set, so figures need not run the
    network again.
    """

    values: Tensor


class Total(NamedTuple):
    """A sum over the k examples of a batch, such as a confusion matrix: any shape, the same for every batch.

    Returned among the scores, they are added up over the whole set, however it is split, for `Recipe.set_scores`:
    `Total(torch.bincount(labels * num_classes + guesses, minlength=num_classes**2))`.
    """

    values: Tensor


def class_means(confusion: Tensor) -> dict[str, float]:
    """Precision, recall and F1, each the mean over the classes that occur, from counts [classes, classes], rows true.

    A class that is never the answer has precision 0, as scikit-learn has it with zero_division=0.
    """
    right, true, answered = confusion.diagonal().double(), confusion.sum(1).double(), confusion.sum(0).double()
    occurs = (true + answered) > 0
    parts = {"precision": right / answered, "recall": right / true, "f1": 2 * right / (true + answered)}
    return {f"macro_{name}": part.nan_to_num(0.0)[occurs].mean().item() for name, part in parts.items()}


def overlaps(answers: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """For each class how many answers are right, and how many answers or labels are of it: float64 [2, num_classes].

    answers, labels: int64 of one shape, such as the classes of pixels. The first by the second is the intersection over
    union (IoU), also called Jaccard index; over several batches add both up, then divide.
    """
    pairs = torch.bincount((num_classes * labels + answers).flatten(), minlength=num_classes**2).double()
    confusion = pairs.view(num_classes, num_classes)
    right = confusion.diagonal()
    return torch.stack([right, confusion.sum(0) + confusion.sum(1) - right])


def verification_curve(similarity: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Rates of false and of true acceptance of pairs, as the threshold of their similarity falls: float64 [n + 1] each.

    similarity: [n]. same: 1 where a pair is of one class, else 0, [n]; both kinds occur. Pairs of equal similarity are
    accepted together.
    """
    similarity, order = similarity.double().cpu().sort(descending=True)
    accepted = same.double().cpu()[order]
    true, false = accepted.cumsum(0) / accepted.sum(), (1 - accepted).cumsum(0) / (1 - accepted).sum()
    last = torch.cat([similarity[1:] != similarity[:-1], torch.ones(1, dtype=torch.bool)])
    zero = torch.zeros(1, dtype=torch.float64)
    return torch.cat([zero, false[last]]), torch.cat([zero, true[last]])


def equal_error_rate(similarity: Tensor, same: Tensor) -> float:
    """The rate of wrongly accepted pairs at the threshold at which it equals that of wrongly rejected ones."""
    false, true = verification_curve(similarity, same)
    above = (false - (1 - true)).tolist()  # rises from -1 to 1
    place = next(number for number, value in enumerate(above) if value >= 0)
    share = -above[place - 1] / (above[place] - above[place - 1])
    return float(false[place - 1] + share * (false[place] - false[place - 1]))


def balanced_weights(labels: Tensor, num_classes: int) -> list[float]:
    """A weight for each class, inverse to its number of labels (int64 [n]); their mean over the examples is 1.

    They are scikit-learn's "balanced" weights: n / (num_classes * count). A class without examples has weight 0.
    """
    counts = torch.bincount(labels, minlength=num_classes).tolist()
    return [len(labels) / (num_classes * count) if count else 0.0 for count in counts]


class Means:
    """Running means of named per-example values of one process, or of all by `reduce`.

    Sums are kept in float64 on the device, so adding costs no synchronisation.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.weights: dict[str, Tensor] = {}  # what a sum is divided by, if not the count

    def add(self, name: str, values: Tensor | Weighted, *, counted: bool = True) -> None:
        """Adds values of examples, [k] or [k, ...], perhaps weighted; `counted=False` only registers the name.

        A process without an example in a batch must know the same names as the others, or `reduce` would not match.
        """
        weight = None
        if isinstance(values, Weighted):
            values, weights = values
            weight = summable(weights).sum(dtype=torch.float64)
        total = summable(values.detach()).sum(dtype=torch.float64)
        self._add(name, total, values.numel(), weight, counted)

    def _add(self, name: str, total: Tensor, count: int, weight: Tensor | None, counted: bool) -> None:
        if not counted:
            total, count, weight = torch.zeros_like(total), 0, None if weight is None else torch.zeros_like(weight)
        if weight is not None or name in self.weights:  # values without weights have the weight 1 each
            added = torch.full_like(total, count) if weight is None else weight
            self.weights[name] = added + self.weights.get(name, self.counts.get(name, 0))
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts.get(name, 0) + count

    def state(self) -> dict[str, tuple[float, ...]]:
        """Name -> (sum, count) or (sum, count, weight) of this process, exact as JSON."""
        plain = {name: (self.sums[name].item(), self.counts[name]) for name in sorted(self.sums)}
        return plain | {name: (*plain[name], weight.item()) for name, weight in self.weights.items()}

    def merge(self, other: Means, *, counted: bool) -> None:
        """Adds another's sums and counts, or only registers its names."""
        for name, total in other.sums.items():
            self._add(name, total, other.counts[name], other.weights.get(name), counted)

    @classmethod
    def from_state(cls, state: Mapping[str, Sequence[float]], device: torch.device) -> Means:
        """Restores what `state` returned."""
        device = torch.device("cpu") if device.type in NO_FLOAT64 else device
        means = cls()
        for name, (total, count, *weight) in state.items():
            means.sums[name] = torch.tensor(total, dtype=torch.float64, device=device)
            means.counts[name] = int(count)
            if weight:
                means.weights[name] = torch.tensor(weight[0], dtype=torch.float64, device=device)
        return means

    def reduce(self, all_reduce_sum: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, tuple[float, int]]:
        """Name -> (mean, count) over all processes, in one collective. Every process must know the same names.

        all_reduce_sum: the sum of a float64 vector over the processes. A mean of nothing is nan.
        """
        names = sorted(self.sums)
        if not names:
            return {}
        device = torch.device("cpu") if device.type in NO_FLOAT64 else device
        counts = torch.tensor([self.counts[name] for name in names], dtype=torch.float64, device=device)
        sums = torch.stack([self.sums[name].to(device) for name in names])
        # one divisor per name, in order: its weight, or its count if it has none
        weights = torch.stack([self.weights.get(name, counts[place]).to(device) for place, name in enumerate(names)])
        values = all_reduce_sum(torch.cat([sums, weights, counts])).reshape(3, -1).T.tolist()
        means: dict[str, tuple[float, int]] = {}
        for name, (total, weight, count) in zip(names, values, strict=True):
            means[name] = (total / weight if weight else math.nan, round(count))
        return {name: means[name] for name in self.sums}  # in the recipe's order


def text_of(scores: dict[str, float]) -> str:
    """Scores as text for a person."""
    return "  ".join(f"{name} {value:.5g}" for name, value in scores.items())
