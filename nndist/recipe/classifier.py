"""A recipe of one network that classifies: its loss, scores, figures and predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.batches import kind_of
from ..errors import UserError
from ..metrics import Output, Total, Weighted, class_means
from .contract import Batch, Networks, Recipe

if TYPE_CHECKING:
    from ..data.sets import Data
    from ..prediction.inputs import Answers, Inputs
    from ..runs.tracking import History


@dataclass(kw_only=True)
class Classifier(Recipe):
    """A recipe whose one network returns logits, shape [k, classes], for batches of (inputs, labels).

    labels: int64 [k], from 0. If there are several inputs, (tokens, lengths, labels), the network is called with all of
    them. Subclasses define `data`, `networks` and `optimizer`.
    """

    loss_weights: ClassVar[Any] = None
    """The loss's weight of each class, [classes], as of torch's cross_entropy; `data` may set it on self."""
    ignore_index: ClassVar[int | None] = None
    """The label of examples that don't count, such as -100: loss, scores and figures leave them out."""
    class_scores: ClassVar[bool] = False
    """Also score macro_precision, macro_recall and macro_f1, means over the classes."""

    def loss(self, networks: Networks, batch: Batch) -> Tensor | Weighted:
        """Cross-entropy of each example in nats, shape [k], weighted by `loss_weights`."""
        *inputs, labels = self._parts_of(batch)
        losses = self._losses(networks["model"](*inputs), labels)
        if self.loss_weights is None:
            return self._counted(losses, labels)
        weights = torch.as_tensor(self.loss_weights, dtype=losses.dtype, device=losses.device)
        if self.ignore_index is not None:
            counts = labels != self.ignore_index
            return Weighted(losses, torch.where(counts, weights[labels.where(counts, 0)], 0.0))
        try:  # an index below 0 would count from the end
            return Weighted(losses, weights.index_select(0, labels.flatten()).view_as(losses))
        except (IndexError, RuntimeError):
            self._check_labels(labels, len(weights))
            raise

    def score(self, networks: Networks, batch: Batch) -> dict[str, Any]:
        """Cross-entropy in nats, unweighted, and accuracy (1 if right, else 0), each [k]; Outputs: logits, labels."""
        *inputs, labels = self._parts_of(batch)
        logits = networks["model"](*inputs)
        answers, size = logits.argmax(1), logits.shape[1]
        scores: dict[str, Any] = {
            "loss": self._counted(self._losses(logits, labels), labels),
            "accuracy": self._counted((answers == labels).float(), labels),
            "logits": Output(logits),
            "labels": Output(labels),  # beside the logits: `collate` may have sorted the batch
        }
        if self.class_scores:
            places = labels * size + answers
            if self.ignore_index is not None:
                places = places[labels != self.ignore_index]
            try:
                scores["confusion"] = Total(torch.bincount(places, minlength=size**2))
            except RuntimeError:
                self._check_labels(labels, size)
                raise
        return scores

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        ignored = -100 if self.ignore_index is None else self.ignore_index  # torch's own default
        return F.cross_entropy(logits, labels, reduction="none", ignore_index=ignored)

    def _counted(self, values: Tensor, labels: Tensor) -> Tensor | Weighted:
        """Values of examples, of which those with the label `ignore_index`, if one is set, don't count."""
        return values if self.ignore_index is None else Weighted(values, (labels != self.ignore_index).to(values.dtype))

    def _check_labels(self, labels: Tensor, size: int) -> None:
        """Raises UserError for the first label that is no class."""
        wrong = labels[(labels < 0) | (labels >= size)]
        if len(wrong):
            raise UserError(
                f"{type(self).__name__}: a label is {int(wrong[0])}, none of the {size} classes; if such examples "
                f"don't count, write ignore_index = {int(wrong[0])} in the recipe's class"
            )

    def _parts_of(self, batch: Batch) -> Sequence[Any]:
        if isinstance(batch, list | tuple) and len(batch) >= 2:
            return batch
        what = f"{type(self).__name__}: let an example of the dataset be a tuple (x, y), or define `loss` and `score`"
        raise UserError(f"{what}: its batches are {kind_of(batch)} and not (inputs, labels)")

    def set_scores(self, means: Mapping[str, float], totals: Mapping[str, Tensor]) -> Mapping[str, float]:
        """The means over the classes, if `class_scores` asks for them."""
        if "confusion" not in totals:
            return {}
        counts = totals["confusion"]
        size = math.isqrt(len(counts))
        return class_means(counts.reshape(size, size))

    def figures(self, networks: Networks, data: Data, history: History) -> dict[str, Any]:
        """Confusion matrix, scores by class, the worst errors, the first predictions, and a table of both."""
        from ..figures.plots import classification

        return classification(
            *(networks["model"], data, self.name, history),
            labels_last=self.labels_are_last(),
            ignored=self.ignore_index,
        )

    def labels_are_last(self) -> bool:
        """Whether a batch ends with its labels, as the methods of this class have it; a custom `score` may not."""
        return type(self).score is Classifier.score

    def predict(self, networks: Networks, inputs: Inputs) -> Answers:
        """The likeliest class of each input."""
        return inputs.classified(networks["model"](inputs.only(networks["model"])))
