"""K-fold cross-validation: which training examples are the validation set of a fold."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import UserError
from .parts import HELD_OUT, divided
from .sets import Data, ExampleSet, Resident, permutation


def parsed(text: str) -> tuple[int, int]:
    """(fold, number of folds) of "2/5"; raises UserError."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    fold, folds = (int(part) for part in match.groups()) if match else (0, 0)
    if not (folds >= 2 and 1 <= fold <= folds):
        raise UserError(f"--fold {text}: give which of how many, such as 2/5")
    return fold, folds


def one_fold(data: Data, text: str) -> Data:
    """Data whose validation set is one fold of its training examples, "2/5", and which trains on the other folds.

    Every example is in one fold; which is a function of their number and classes alone. Each class is spread
    evenly over the folds if `Data.classes` is given and the labels are known; the folds of `sequential` examples follow
    each other. Raises UserError if there is a validation set already, or a fold would be empty.
    """
    fold, folds = parsed(text)
    if "val" in data.evaluation_sets():
        raise UserError(f"--fold {text}: the recipe's data has its own validation set, whose place it would take")
    total = len(data.train)
    if total < folds:
        raise UserError(f"--fold {text}: there are {total:,} training examples; give at most as many folds")
    labels = None if data.sequential else labels_of(data.train, len(data.classes))
    order = torch.arange(total) if data.sequential else permutation(total, 0, HELD_OUT)
    if labels is not None:
        order = order[labels[order].argsort(stable=True)]  # class by class, then dealt out in turn
    place = torch.empty(total, dtype=torch.int64)
    turns = torch.arange(total)
    place[order] = turns * folds // total if data.sequential else turns % folds
    held_out, rest = (numbers.flatten() for numbers in ((place == fold - 1).nonzero(), (place != fold - 1).nonzero()))
    how = "in order" if data.sequential else "drawn at random" if labels is None else "each class in equal shares"
    note = f"{fold} of {folds}, {how}: {len(rest):,} to train on, {len(held_out):,} to validate"
    return replace(divided(data, rest, held_out), plan={**data.plan, "fold": note})


def labels_of(examples: ExampleSet, num_classes: int) -> Tensor | None:
    """The class of each example, int64 [number of examples], on the CPU; None if it is not known without reading them.

    That is the attribute `labels` of a set, or the last tensor of a Resident one, if they are whole numbers below
    `num_classes`.
    """
    labels = getattr(examples, "labels", None)
    if labels is None and isinstance(examples, Resident):
        labels = examples.tensors[-1]
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point() or not num_classes:
        return None
    labels = labels.cpu().long()
    fits = len(labels) == len(examples) and int(labels.min()) >= 0 and int(labels.max()) < num_classes
    return labels if fits else None
