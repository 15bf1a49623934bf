"""The best evaluation so far by the score that the recipe names, and early stopping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..data.sets import Data
from ..errors import UserError
from ..recipe.classifier import Classifier
from ..recipe.contract import Recipe
from ..recipe.fields import check_best


class Best:
    """Tracks the best evaluation.

    record: its {"step", "scores"}; None before the first, or if the recipe names no score. evaluations_since: how many
    have followed it without improvement. stopped: why training ends early, or "".
    """

    def __init__(self, recipe: Recipe, data: Data) -> None:
        self.recipe = recipe
        self.record: dict[str, Any] | None = None
        self.evaluations_since = 0
        self.stopped = ""
        if recipe.best is not None:
            self._check_name(recipe.best, data)

    def judge(self, step: int, scores: Mapping[str, float]) -> bool:
        """Whether these scores are the best so far; NaN never is. Raises UserError if the score is not among them."""
        name = self.recipe.best
        check_best(name)  # a hook may have set it
        if name is None:
            return False
        if name not in scores:
            raise UserError(f"--best {name}: no such score; choose from {', '.join(scores)}")
        sign = 1 if self.recipe.best_direction() == "highest" else -1
        best = self.record["scores"][name] if self.record else -sign * math.inf
        if sign * scores[name] > sign * best:
            self.record = {"step": step, "scores": dict(scores)}
            self.evaluations_since = 0
            return True
        self.evaluations_since += 1
        self.check_patience()
        return False

    def check_patience(self) -> None:
        """Sets `stopped` after `--patience` evaluations without improvement."""
        if self.recipe.patience is None or self.evaluations_since < self.recipe.patience:
            return
        since = f"step {self.record['step']:,}" if self.record else "the beginning"
        count = f"{self.recipe.patience} evaluation{'s' * (self.recipe.patience > 1)}"
        self.stopped = f"stopped early: {self.recipe.best} has not improved in {count} since {since}"

    def _check_name(self, name: str, data: Data) -> None:
        """Raises UserError if no score can have that name; the names of a custom `score` are known only later."""
        sets = data.sets_in_training()
        of_recipe = type(self.recipe).score
        scores = {Recipe.score: ["loss"], Classifier.score: ["loss", "accuracy"]}.get(of_recipe)
        of_classes = ["macro_precision", "macro_recall", "macro_f1"]
        of_sets = type(self.recipe).set_scores
        if scores is not None and of_sets is Classifier.set_scores and getattr(self.recipe, "class_scores", False):
            scores = scores + of_classes * (of_recipe is Classifier.score)
        elif of_sets not in (Recipe.set_scores, Classifier.set_scores):
            scores = None
        set_name, _, score = name.partition("/")
        if set_name not in sets or not score or (scores is not None and score not in scores):
            names = ", ".join(f"{one}/{score}" for one in sets for score in scores or ["..."])
            if set_name in data.sets_at_end():
                raise UserError(f"--best {name}: the test set is scored only at the end; choose from {names}")
            if score in of_classes and of_recipe is Classifier.score:
                names += f"; class_scores = True in the recipe adds {', '.join(of_classes)}"
            raise UserError(f"--best {name}: no such score; choose from {names}")
        self.recipe.best_direction()
