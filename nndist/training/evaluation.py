"""Exact evaluation: every example once over all processes, sums and counts, the count asserted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Batch
from ..data.feed import evaluation_indices
from ..data.sets import Data, ExampleSet
from ..distributed.blocks import is_split
from ..distributed.runtime import Runtime
from ..metrics import MAX_OUTPUTS, Means, Output, checked, per_example
from ..recipe.contract import Recipe
from ..runs.optimizer_state import random_state, set_random_state


@dataclass
class Evaluation:
    """scores: the mean of each score over the set. outputs: of its first MAX_OUTPUTS examples, by name, in order."""

    scores: dict[str, float]
    outputs: dict[str, Tensor]


@contextlib.contextmanager
def evaluating(networks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within it the networks are in evaluation mode and no gradients are recorded."""
    training = [(module, module.training) for network in networks.values() for module in network.modules()]
    for network in networks.values():
        network.eval()
    try:
        with torch.no_grad():  # not inference_mode: a tensor that a network caches would be lost to training
            yield
    finally:
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
) -> Evaluation:
    """The mean of each of the recipe's scores over a set, and its outputs; the same on all processes.

    `observe` is given the scores of each batch of this process, the prepared batch, and whether its examples count.
    Raises UserError where a score is not one number per example.
    """
    means = Means()
    kept: dict[str, list[Tensor]] = {}
    indices = evaluation_indices(len(examples), batch_size, runtime.rank, runtime.world_size)
    num_counted = len(indices)
    wanted_passes = 1  # with more processes than examples: to learn the names
    if any(is_split(network) for network in networks.values()):  # they are run by all processes or by none
        wanted_passes = len(evaluation_indices(len(examples), batch_size, 0, runtime.world_size))
    indices += [torch.zeros(1, dtype=torch.int64)] * (wanted_passes - num_counted)
    with evaluating(networks):
        for number, (raw, index) in enumerate(zip(examples.batches(indices), indices, strict=True)):
            counted = number < num_counted
            runtime.alive()
            with runtime.autocast():
                batch = data.prepare(raw)
                scores = recipe.score(networks, batch)
            if observe is not None:
                observe(scores, batch, counted)
            for name, values in scores.items():
                if isinstance(values, Output):
                    wanted = max(0, MAX_OUTPUTS - int(index[0])) if counted else 0
                    kept.setdefault(name, []).append(values.values[:wanted])
                else:
                    checked(values, len(index), f"score {name!r}", "score")
                    means.add(name, per_example(values), counted=counted)
    reduced = means.reduce(runtime.sum, runtime.device)
    for name, (_, count) in reduced.items():
        assert count == len(examples), f"score {name!r} was counted {count} times for {len(examples)} examples"
    outputs = {name: runtime.gather_rows(torch.cat(parts)) for name, parts in kept.items()}
    return Evaluation({name: mean for name, (mean, _) in reduced.items()}, outputs)


def evaluate_all(
    recipe: Recipe,
    networks: Mapping[str, nn.Module],
    data: Data,
    sets: Mapping[str, ExampleSet],
    runtime: Runtime,
    batch_size: int = 1000,
) -> Evaluation:
    """Every score of sets of the data, as "<set>/<score>"; the outputs of the test set, where it is among them."""
    found = {
        name: evaluate_set(recipe, networks, data, examples, runtime, batch_size) for name, examples in sets.items()
    }
    scores = {f"{name}/{score}": mean for name, of_set in found.items() for score, mean in of_set.scores.items()}
    return Evaluation(scores, found["test"].outputs if "test" in found else {})


@contextlib.contextmanager
def forked_random_state(runtime: Runtime, seed: int) -> Iterator[None]:
    """Within it all generators are seeded for an evaluation; afterwards they are as they were."""
    before = random_state(runtime.device)
    runtime.seed_all(seed)
    try:
        yield
    finally:
        set_random_state(*before, runtime.device)
