"""Exact evaluation: every example once over all processes, by sums and counts; the count is asserted."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Batch, tensors_of
from ..data.feed import evaluation_indices
from ..data.sets import Data, ExampleSet
from ..distributed.batch_norm import Sums
from ..distributed.blocks import is_sharded
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..recipe.contract import Recipe
from ..runs.python_state import PythonState
from ..runs.python_undo import unnoticed
from ..runs.random_state import is_random_state, random_state, set_random_state
from .score_sums import ScoreSums

RANDOM_SCORES = (
    "score or what prepares its batches draws random numbers: scores depend on the number of processes and "
    "--eval-batch-size; where they must not, draw the numbers in data(), some for each example"
)
OWN_BATCHES = (
    "score sets BatchNorm to training mode: it takes each process's own batch and leaves running statistics alone, so "
    "scores depend on the number of processes and --eval-batch-size; where they must not, leave it in evaluation mode"
)


@dataclass
class Evaluation:
    """scores: the mean of each over the set. outputs: by name, those of its first MAX_OUTPUTS examples, in order."""

    scores: dict[str, float]
    outputs: dict[str, Tensor]


@contextlib.contextmanager
def evaluating(networks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Context manager: the networks are in evaluation mode and no gradients are recorded.

    A BatchNorm that a recipe sets to training mode meanwhile uses its own process's batch.
    """
    training = [(module, module.training) for network in networks.values() for module in network.modules()]
    for network in networks.values():
        network.eval()
    own_batch, Sums.own_batch = Sums.own_batch, True
    try:
        with torch.no_grad():  # not inference_mode: training could not use a tensor that a network caches here
            yield
    finally:
        Sums.own_batch = own_batch
        for module, mode in training:
            module.training = mode


def evaluate_set(
    recipe: Recipe,
    networks: Mapping[str, nn.Module],
    data: Data,
    examples: ExampleSet,
    runtime: Runtime,
    batch_size: int = 1000,
    observe: Callable[[Mapping[str, Any], Batch, bool], None] | None = None,
    *,
    seed: int,
    notes: list[str] | None = None,
) -> Evaluation:
    """The mean of each of the recipe's scores over a set, and its outputs; identical on all processes.

    `observe` receives the scores of each batch of this process, the prepared batch, and whether its examples count.
    seed: of the random numbers that scores draw, for each set anew. notes: where to add what a user should know of the
    scores; None if it was said before. Raises UserError if a score is not one number per example.
    """
    sums = ScoreSums(watched=notes is not None)
    indices = evaluation_indices(len(examples), batch_size, runtime.rank, runtime.world_size)
    num_counted = len(indices)
    wanted_passes = 1  # also with more processes than examples, to learn the outputs' types
    if any(is_sharded(network) for network in networks.values()):  # all processes must run them together
        wanted_passes = len(evaluation_indices(len(examples), batch_size, 0, runtime.world_size))
    indices += [torch.zeros(1, dtype=torch.int64)] * (wanted_passes - num_counted)
    with forked_random_state(runtime, seed):
        if runtime.rank:  # the main process draws what a process alone would draw first, the others something else
            runtime.seed(seed, rank=runtime.rank)
        begun = random_state(runtime.device) if notes is not None and runtime.world_size > 1 else None
        Sums.took_own = False
        with evaluating(networks):
            for number, (raw, index) in enumerate(zip(examples.batches(indices), indices, strict=True)):
                counted = number < num_counted
                runtime.alive()
                no_trace = contextlib.nullcontext() if counted else unnoticed(PythonState(recipe, {}))
                with runtime.autocast(), no_trace:  # a metric that the recipe keeps must not count what doesn't
                    batch = data.prepare(raw)
                    scores = recipe.score(networks, batch)
                if not isinstance(scores, Mapping):
                    what = "values, one per example: {'accuracy': answers == labels}"
                    raise UserError(_no_names("score", scores, what))
                if observe is not None:
                    observe(scores, batch, counted)
                for name, values in scores.items():
                    sums.add(name, values, index, partial(tensors_of, batch), counted)
        if notes is not None and begun is not None and not is_random_state(begun, runtime.device):
            notes.append(RANDOM_SCORES)
        if notes is not None and Sums.took_own:
            notes.append(OWN_BATCHES)
        if runtime.world_size > 1:
            runtime.seed_all(seed)  # set_scores, such as by a bootstrap, must come to the same on all
        sums.gather(len(indices), len(examples), runtime)
        if notes is not None:
            notes += sums.notes()
        means = sums.reduced_means(len(examples), runtime)
        outputs = sums.gathered_outputs(runtime)
        return Evaluation(means | _of_the_set(recipe, means, sums.reduced_totals(runtime), runtime), outputs)


def _of_the_set(
    recipe: Recipe, means: Mapping[str, float], sums: Mapping[str, Tensor], runtime: Runtime
) -> dict[str, float]:
    """The recipe's scores of a whole set; raises UserError if one is not a number, or differs between processes."""
    scores = recipe.set_scores(means, sums)
    own: dict[str, float] = {}
    wrong = ""
    if not isinstance(scores, Mapping):
        wrong, scores = _no_names("set_scores", scores, "numbers: {'rmse': math.sqrt(means['squared_error'])}"), {}
    for name, value in scores.items():
        try:
            own[name] = float(value)
        except (TypeError, ValueError):
            wrong = wrong or f"set_scores: {name!r} is a {type(value).__name__}, it must be a number"
    if runtime.world_size > 1 and type(recipe).set_scores is not Recipe.set_scores:
        outcomes = runtime.gather_objects([wrong, own])
        wrong = next((theirs for theirs, _ in outcomes if theirs), "")
        for rank, (_, theirs) in enumerate(outcomes):
            wrong = wrong or _differing(outcomes[0][1], theirs, rank)
        own = outcomes[0][1]
    if wrong:
        raise UserError(wrong)
    return own


def _no_names(method: str, returned: Any, values: str) -> str:
    """The error line of a method that should return a dict of names and `values`."""
    what = "None" if returned is None else f"a {type(returned).__name__}"
    return f"{method}: returns {what}; return a dict of names and {values}"


def _differing(ours: Mapping[str, float], theirs: Mapping[str, float], rank: int) -> str:
    """An error line if the scores of a set on process 0 and another differ by more than rounding; "" if not."""
    for name in sorted({*ours, *theirs}):
        one, other = ours.get(name), theirs.get(name)
        if one is not None and other is not None and _close(one, other):
            continue
        return (
            f"set_scores: {name!r} is {one} on process 0 and {other} on process {rank}: it must depend on nothing but "
            "means and totals, which are of all processes; return what it needs from score, as a Total or a mean"
        )
    return ""


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-12) or (math.isnan(one) and math.isnan(other))


def evaluate_all(
    recipe: Recipe,
    networks: Mapping[str, nn.Module],
    data: Data,
    sets: Mapping[str, ExampleSet],
    runtime: Runtime,
    batch_size: int = 1000,
    *,
    seed: int,
    notes: list[str] | None = None,
) -> Evaluation:
    """Every score of the given sets, as "<set>/<score>"; the outputs of the test set, if it is among them.

    seed, notes: as `evaluate_set` takes them.
    """
    by_set = {
        name: evaluate_set(recipe, networks, data, examples, runtime, batch_size, seed=seed, notes=notes)
        for name, examples in sets.items()
    }
    scores = {f"{name}/{score}": mean for name, of_set in by_set.items() for score, mean in of_set.scores.items()}
    return Evaluation(scores, by_set["test"].outputs if "test" in by_set else {})


@contextlib.contextmanager
def forked_random_state(runtime: Runtime, seed: int) -> Iterator[None]:
    """Context manager: all random generators are seeded for an evaluation, then restored."""
    before = random_state(runtime.device)
    runtime.seed_all(seed)
    try:
        yield
    finally:
        set_random_state(*before, runtime.device)
