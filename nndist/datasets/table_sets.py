"""A person's own table as training and test lines: the target, the split, and the scaling of the training part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nndist.data.sets import permutation
from nndist.errors import UserError
from nndist.files import printable
from nndist.recipe.scaling import Scaling

from .tables import Spec, encoded, fitted, is_gap, number_of, read_table, shape

Task = Literal["auto", "classes", "numbers"]
MOST_CLASSES = 20  # distinct whole numbers that are taken for classes


@dataclass
class Found:
    """A table to learn from.

    train, test: x, float32 [lines, numbers + categories] (see tables), and y: classes, int64 [lines], or numbers,
    float32 [lines, 1]. classes: their names, none if the target is a number; y_scaling: then that of the training
    lines. plan: lines for the plan.
    """

    spec: Spec
    target: str
    classes: list[str]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    x_scaling: Scaling
    y_scaling: Scaling | None
    plan: dict[str, str]


def load(path: Path, target: str | None, task: Task, ignore: Sequence[str], test_share: float, in_order: bool) -> Found:
    """The table in a CSV file, whose lines without a target are left out; raises UserError."""
    table = read_table(path)
    flag = f"--target {printable(target or '')}"
    if target not in table.names:
        what = flag if target else "--target"
        raise UserError(f"{what}: name a column of {path}: {', '.join(map(printable, table.names))}")
    if unknown := [name for name in ignore if name not in table.names or name == target]:
        raise UserError(f"--ignore {printable(unknown[0])}: no other column of {path} has that name")
    known = [number for number, cell in enumerate(table.column(target)) if not is_gap(cell)]
    num_lines = len(table.rows)
    table = table.some(known)
    goals = table.column(target)
    if len(goals) < 10:
        raise UserError(f"{flag}: {path} has {len(goals)} lines with a target; there must be at least 10")
    classes = classes_of(goals, task, flag)
    train_lines, test_lines = split(goals if classes else None, len(goals), test_share, in_order)
    train, test = table.some(train_lines), table.some(test_lines)
    spec = fitted(train, [target, *ignore])
    x, test_x = encoded(spec, train), encoded(spec, test)
    places = {name: number for number, name in enumerate(classes)}

    def goal(cells: list[str]) -> Tensor:
        if classes:
            return torch.tensor([places[cell] for cell in cells])
        return torch.tensor([number_of(cell) for cell in cells], dtype=torch.float32).unsqueeze(1)

    y, test_y = goal(train.column(target)), goal(test.column(target))
    num_numbers, _ = shape(spec)
    chosen = "the last" if in_order else "drawn by number" + " in each class" * bool(classes)
    kinds = [column["kind"] for column in spec]
    counts = [f"{kinds.count(kind)} {kind}" for kind in ("number", "date", "category", "left out") if kind in kinds]
    gaps = int(x[:, :num_numbers].isnan().sum())
    plan = {
        "target": f"{printable(target)}: " + (_classes_text(classes, y) if classes else "a number"),
        "columns": ", ".join(counts) + (f"; {gaps:,} gaps" if gaps else ""),
        "split": f"{test_share:.0%} of {len(goals):,} lines to test on, {chosen}",
    }
    if left := [column["name"] for column in spec if column["kind"] == "left out"]:
        plan["left out"] = ", ".join(map(printable, left[:6])) + (f" and {len(left) - 6} more" if len(left) > 6 else "")
    if len(goals) < num_lines:
        plan["gaps"] = f"{num_lines - len(goals):,} of {num_lines:,} lines left out: no target"
    y_scaling = None if classes else Scaling.fit(y)
    return Found(spec, target, classes, (x, y), (test_x, test_y), scaling_of(x, num_numbers), y_scaling, plan)


def _classes_text(classes: Sequence[str], y: Tensor) -> str:
    counts = y.bincount(minlength=len(classes)).tolist()
    if len(classes) <= 6:
        return ", ".join(f"{printable(name)} {count:,}" for name, count in zip(classes, counts, strict=True))
    return f"{len(classes)} classes of {min(counts):,} to {max(counts):,} training lines"


def scaling_of(x: Tensor, num_numbers: int) -> Scaling:
    """The scaling of x's numbers by the known ones among them; categories stay as they are."""
    numbers = x[:, :num_numbers].double()
    count = (~numbers.isnan()).sum(0).clamp_min(1)
    mean = numbers.nansum(0) / count
    std = ((numbers - mean).square().nansum(0) / count).sqrt()
    std = torch.where(std > 1e-9 * mean.abs().clamp_min(1e-9), std, 1.0)
    rest = x.shape[1] - num_numbers
    return Scaling(torch.cat([mean, torch.zeros(rest)]).float(), torch.cat([std, torch.ones(rest)]).float())


def classes_of(cells: Sequence[str], task: Task, flag: str) -> list[str]:
    """The classes in a target's cells, sorted; [] if it is a number to be estimated. Raises UserError."""
    numbers = [number_of(cell) for cell in cells]
    are_numbers = None not in numbers
    if task == "numbers" and not are_numbers:
        bad = cells[numbers.index(None)]
        raise UserError(f"{flag}: --task numbers, but {printable(bad)!r} is none")
    distinct = set(cells)
    whole = are_numbers and all(number == int(number) for number in numbers if number is not None)
    if task == "numbers" or (task == "auto" and are_numbers and not (whole and len(distinct) <= MOST_CLASSES)):
        return []
    if len(distinct) < 2 or len(distinct) > max(2, len(cells) // 2):
        raise UserError(
            f"{flag}: {len(distinct):,} distinct values in {len(cells):,} lines are not classes; name a column of at "
            "least two values that repeat"
        )
    return sorted(distinct, key=float if are_numbers else str)


def split(labels: Sequence[str] | None, total: int, share: float, in_order: bool) -> tuple[list[int], list[int]]:
    """The numbers of the training lines and of the test lines: the last, or some drawn at random, of each class.

    labels: the classes; None for a target that is a number. The choice depends on them alone.
    """
    if in_order:
        count = min(max(1, round(share * total)), total - 1)
        return list(range(total - count)), list(range(total - count, total))
    groups: dict[str, list[int]] = {}
    for number, label in enumerate(labels if labels is not None else [""] * total):
        groups.setdefault(label, []).append(number)
    chosen: set[int] = set()
    for place, members in enumerate(groups.values()):
        count = min(max(1, round(share * len(members))), len(members) - 1)
        chosen |= {members[n] for n in permutation(len(members), place, -1)[:count].tolist()}
    return [n for n in range(total) if n not in chosen], sorted(chosen)
