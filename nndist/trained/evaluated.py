"""The scores of an evaluation by set and by class, and the confusion matrix, as text, JSON and a figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Batch, inputs_and_classes
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..metrics import Output, text_of

SHOWN_CONFUSIONS = 15  # confused pairs of classes that are listed if the matrix is too wide for a terminal
MATRIX_WIDTH = 80


class ClassCounts:
    """Accumulates a confusion matrix, if a recipe's scores include its logits as an Output.

    ignored: a label that does not count, beside those that are no class. After `total`, over all processes: left_out is
    the number of examples with such labels; note says why there is no matrix where one might be expected.
    """

    def __init__(self, classes: Sequence[str], *, labels_last: bool = False):
        self.classes, self.labels_last = classes, labels_last
        self.ignored: int | None = None
        self.counts: Tensor | None = None
        self.left_out = 0
        self.note = ""

    def add(self, scores: Mapping[str, Any], batch: Batch, counted: bool) -> None:
        """Add a batch, by what `Recipe.score` returned; not counted if it is unclear which part is the labels.

        Nor for a single logit, whose sign tells the class.
        """
        logits = scores.get("logits")
        if not isinstance(logits, Output) or logits.values.dim() != 2 or logits.values.shape[1] < 2:
            return
        try:
            _, labels = inputs_and_classes(batch, last=self.labels_last, what="labels")
        except UserError:
            return
        answers = logits.values.argmax(1)
        size = logits.values.shape[1]
        if len(labels) != len(answers):
            return
        if self.counts is None:  # the last is of those that are left out
            self.counts = torch.zeros(size * size + 1, dtype=torch.int64, device=answers.device)
        if counted:
            labels = labels.long()
            is_class = (labels >= 0) & (labels < size)
            if self.ignored is not None:
                is_class &= labels != self.ignored
            places = torch.where(is_class, labels * size + answers, size * size)
            self.counts += torch.bincount(places, minlength=size * size + 1)

    def total(self, runtime: Runtime, scores: Mapping[str, float]) -> Tensor | None:
        """The counts over all processes, int64 [classes, classes] on the CPU: rows true, columns predicted.

        None if no label is a class, or if the counts contradict the accuracy in `scores`, the means over the set: the
        integers that were taken for labels are then something else.
        """
        if self.counts is None:
            return None
        size = round((len(self.counts) - 1) ** 0.5)
        summed = runtime.sum(self.counts).cpu()
        matrix, self.left_out = summed[:-1].reshape(size, size), int(summed[-1])
        counted, accuracy = int(matrix.sum()), scores.get("accuracy")
        if not counted:
            return None
        if accuracy is not None and not self._agrees(int(matrix.trace()), counted, accuracy):
            self.note = (
                "no confusion matrix: the only integers of a batch that may be labels contradict the score accuracy; "
                "let the only integers [k] after the inputs be the labels, from 0"
            )
            return None
        return matrix

    def _agrees(self, right: int, counted: int, accuracy: float) -> bool:
        """Whether an accuracy, from 0 to 1 or in percent, is of as many right answers, to half an example.

        A score may count what is left out as wrong.
        """
        every = counted + self.left_out
        return any(
            abs(right - share * number) < 0.5 + 1e-5 * number
            for share in (accuracy, accuracy / 100)
            for number in (counted, every)
        )


@dataclass
class SetScores:
    """examples: how many. scores: their means. confusion: int64 [classes, classes], rows true, columns predicted."""

    examples: int
    scores: dict[str, float]
    confusion: Tensor | None

    def by_class(self) -> list[dict[str, Any]]:
        """Per class: examples, how many are right, precision and recall (None if undefined)."""
        if self.confusion is None:
            return []
        right, true, answered = self.confusion.diagonal(), self.confusion.sum(1), self.confusion.sum(0)
        rows = zip(true.tolist(), right.tolist(), answered.tolist(), strict=True)
        return [
            {"examples": n, "right": k, "precision": k / a if a else None, "recall": k / n if n else None}
            for n, k, a in rows
        ]


@dataclass
class Evaluated:
    """An evaluation: its run, weights, training data and data, and the scores of every set."""

    run: str
    weights: str
    trained_on: str
    data: str
    classes: list[str]
    sets: dict[str, SetScores]
    device: str
    notes: list[str]

    @property
    def scores(self) -> dict[str, float]:
        """The scores by their names in training, such as "test/accuracy"."""
        return {f"{name}/{score}": v for name, one in self.sets.items() for score, v in one.scores.items()}

    def json_value(self) -> dict[str, Any]:
        """All of it, as a JSON value."""
        sets = {}
        for name, one in self.sets.items():
            sets[name] = {"examples": one.examples, "scores": one.scores}
            if one.confusion is not None:
                by_class = [{"class": self._class(c), **row} for c, row in enumerate(one.by_class())]
                sets[name] |= {"classes": by_class, "confusion": one.confusion.tolist()}
        about = {"run": self.run, "weights": self.weights, "trained_on": self.trained_on, "data": self.data}
        return {**about, "device": self.device, "notes": self.notes, "sets": sets}

    def lines(self) -> Iterator[str]:
        """Lines for a terminal of 80 columns; every line with a number names the data."""
        yield f"run      {self.run}: {self.weights}"
        yield f"data     {self.data}" + ("" if self.data == self.trained_on else f"; trained on {self.trained_on}")
        yield f"device   {self.device}"
        yield from (f"note     {note}" for note in self.notes)
        for name, one in self.sets.items():
            for score, value in one.scores.items():
                yield f"result   {text_of({f'{name}/{score}': value})}  ({self.data}, {one.examples:,} examples)"
        for name, one in self.sets.items():
            if one.confusion is not None:
                yield ""
                yield from self._class_lines(name, one, one.confusion)

    def _class_lines(self, name: str, one: SetScores, confusion: Tensor) -> Iterator[str]:
        """A line per class, then the confusion matrix; the most frequent errors instead if it is too wide."""
        names = [self._class(c) for c in range(len(confusion))]
        longest = max(map(len, names))
        space = min(24, max(len("class"), longest))
        head = f"{self.data}, {name}"
        yield f"{head}  {'class':{space}}  examples    right  precision  recall"
        for label, row in zip(names, one.by_class(), strict=True):
            precision, recall = (f"{row[k]:.2%}" if row[k] is not None else "-" for k in ("precision", "recall"))
            counts = f"{row['examples']:>8,} {row['right']:>8,}"
            yield f"{head}  {label[:space]:{space}}  {counts}  {precision:>9}  {recall:>6}"
        yield ""
        # short names head their columns in full, such as digits; longer ones are cut
        cell = max(4, 1 + len(str(int(confusion.max()))), 1 + longest if longest < 5 else 0)
        if len(head) + 2 + space + 1 + cell * len(names) <= MATRIX_WIDTH:
            yield f"{head}  {'':{space}}  taken for"
            columns = [f"{label[: cell - 1]:>{cell}}" for label in names]
            yield f"{head}  {'true':{space}} {''.join(columns)}"
            for label, counts in zip(names, confusion.tolist(), strict=True):
                cells = "".join(f"{n or '·':>{cell}}" for n in counts)
                yield f"{head}  {label[:space]:{space}} {cells}"
            return
        errors = confusion.clone().fill_diagonal_(0).flatten()
        most = errors.topk(min(SHOWN_CONFUSIONS, len(errors)))
        yield f"{head}  most frequent errors (--json has all):"
        for count, place in zip(most.values.tolist(), most.indices.tolist(), strict=True):
            if count:
                true, answered = divmod(place, len(names))
                yield f"{head}  {count:>6,}  {names[true]} taken for {names[answered]}"

    def figure(self) -> Any:
        """The confusion matrix of the first set that has one; raises UserError if none has."""
        from .. import figures

        for name, one in self.sets.items():
            if one.confusion is not None:
                names = [self._class(c) for c in range(len(one.confusion))]
                right = f"{int(one.confusion.trace()):,} of {int(one.confusion.sum()):,} right"
                return figures.confusion_matrix(one.confusion, names, f"{self.run} on {self.data}, {name}\n{right}")
        raise UserError(
            "--figure: a confusion matrix needs a classifier's logits among the scores; this recipe has none"
        )

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _class(self, number: int) -> str:
        return self.classes[number] if number < len(self.classes) else str(number)
