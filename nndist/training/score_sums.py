"""What the scores of an evaluation's batches add up to over all processes, whichever of them each batch has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed.runtime import Runtime
from ..errors import UserError
from ..metrics import (
    MAX_OUTPUTS,
    NO_FLOAT64,
    Forms,
    Means,
    Output,
    Total,
    Weighted,
    checked,
    figure_of_batch,
    per_example,
    summable,
)


class ScoreSums:
    """The scores of this process's batches; `gather` compares them with the others', then the rest reduces them.

    A Weighted score that a batch lacks has the weight 0 there, and a Total is 0; any other must be in every batch. So
    processes may know different names. watched: whether to find scores of whole batches, for `notes`.
    """

    def __init__(self, *, watched: bool = False) -> None:
        self.watched = watched
        self.figures: dict[str, Tensor] = {}  # the least of `figure_of_batch` over the batches
        self.means, self.forms = Means(), Forms()
        self.totals: dict[str, Tensor] = {}
        self.outputs: dict[str, list[Tensor]] = {}  # of each batch, also of one that does not count, which has none
        self.everyones: list[dict[str, list[Any]]] = []

    def add(
        self, name: str, values: Any, index: Tensor, tensors: Callable[[], Iterable[Tensor]], counted: bool
    ) -> None:
        """Adds one score of a batch of the examples `index`; raises UserError if it is not one number per example.

        tensors: those of the batch. counted: whether its examples count.
        """
        if isinstance(values, Output):
            wanted = max(0, MAX_OUTPUTS - int(index[0])) if counted else 0
            self.outputs.setdefault(name, []).append(values.values[:wanted])
        elif not counted:
            pass
        elif isinstance(values, Total):
            self._add_total(name, values.values)
        else:
            checked(values, len(index), f"score {name!r}", "score", tensors)
            self.forms.check(name, f"score {name!r}", values)
            one_each = per_example(values)
            self.means.add(name, one_each)
            if self.watched and isinstance(one_each, Tensor) and one_each.is_floating_point() and len(index) > 1:
                figure = figure_of_batch(one_each)
                self.figures[name] = figure.minimum(self.figures.get(name, figure))

    def _add_total(self, name: str, values: Any) -> None:
        """Adds a batch's sum to those before it, in float64; raises UserError if it has another shape."""
        if not isinstance(values, Tensor):
            raise UserError(f"score {name!r}: a Total is made of a tensor, not of a {type(values).__name__}")
        added = summable(values.detach()).double()
        before = self.totals.get(name)
        if before is not None:
            _check_shape(name, before.shape, added.shape)
        self.totals[name] = added.clone() if before is None else before + added  # the recipe may keep its tensor

    def gather(self, num_batches: int, num_examples: int, runtime: Runtime) -> None:
        """Learns the names of all processes; raises UserError, on all, if they do not go together.

        num_batches: this process's, with those that do not count. num_examples: of all processes.
        """
        shapes_of = {name: {part.shape[1:] for part in parts if len(part)} for name, parts in self.outputs.items()}
        whole = {name: len(parts) == num_batches for name, parts in self.outputs.items()}
        own = {
            "means": [[name, form, self.means.counts[name]] for name, form in self.forms.by_name.items()],
            "totals": [[name, list(total.shape)] for name, total in self.totals.items()],
            "outputs": [[name, sorted(shapes), whole[name]] for name, shapes in shapes_of.items()],
            "figures": [[name, *figure.tolist()] for name, figure in self.figures.items()],
        }
        self.everyones = runtime.gather_objects(own)
        self.forms.check_others(
            ({name: form for name, form, _ in of_process["means"]} for of_process in self.everyones), "score"
        )
        counts: dict[str, int] = {}
        for name, _, count in self._of_all("means"):
            counts[name] = counts.get(name, 0) + count
        for name, form, _ in self._of_all("means"):
            if form is not None and counts[name] != num_examples:
                raise UserError(
                    f"score {name!r}: only some batches have it; return it for every batch, as nndist.Weighted with "
                    "weights of 0 where there is nothing to count"
                )
        shapes: dict[str, list[int]] = {}
        for name, shape in self._of_all("totals"):
            _check_shape(name, shapes.setdefault(name, shape), shape)
        for name, *_ in self._of_all("outputs"):
            of_name = [is_whole for other, _, is_whole in self._of_all("outputs") if other == name]
            if not all(of_name) or len(of_name) < runtime.world_size:
                raise UserError(f"score {name!r}: only some batches have it; return an Output for every batch")

    def _of_all(self, kind: str) -> list[list[Any]]:
        return [entry for of_process in self.everyones for entry in of_process[kind]]

    def notes(self) -> list[str]:
        """A line on each score that is one of batches, such as the F1 of each, and so has no mean over the set."""
        found: dict[str, list[list[float]]] = {}
        for name, *figure in self._of_all("figures"):
            found.setdefault(name, []).append(figure)
        lines = []
        for name, figures in found.items():
            always, low, negated = (min(column) for column in zip(*figures, strict=True))
            if always and low < math.inf and not math.isclose(low, -negated, rel_tol=1e-6):
                lines.append(
                    f"score {name!r} has one value for all examples of a batch, and another in the next: its mean "
                    "depends on --eval-batch-size and the number of processes; return a Total, and the score from "
                    "set_scores"
                )
        return lines

    def reduced_means(self, num_examples: int, runtime: Runtime) -> dict[str, float]:
        """The mean of each score over all processes, in the recipe's order."""
        forms = {name: form for name, form, _ in reversed(self._of_all("means"))}
        nothing = torch.zeros(0, device=runtime.device)
        for name in forms.keys() - self.means.sums.keys():
            self.means.add(name, Weighted(nothing, nothing) if forms[name] is None else nothing)
        reduced = self.means.reduce(runtime.sum, runtime.device)
        for name, (_, count) in reduced.items():
            assert forms[name] is None or count == num_examples, (
                f"score {name!r} was counted {count} times for {num_examples} examples"
            )
        return {name: reduced[name][0] for name in dict.fromkeys(name for name, *_ in self._of_all("means"))}

    def reduced_totals(self, runtime: Runtime) -> dict[str, Tensor]:
        """The Totals over all processes by name, float64 on the CPU."""
        device = torch.device("cpu") if runtime.device.type in NO_FLOAT64 else runtime.device
        shapes = {name: shape for name, shape in self._of_all("totals")}
        nothing = {name: torch.zeros(shapes[name], dtype=torch.float64, device=device) for name in sorted(shapes)}
        return {name: runtime.sum(self.totals.get(name, zeros).to(device)).cpu() for name, zeros in nothing.items()}

    def gathered_outputs(self, runtime: Runtime) -> dict[str, Tensor]:
        """The outputs of all processes by name; raises UserError, on all of them, if an example's shape varies."""
        outputs: dict[str, Tensor] = {}
        for name in dict.fromkeys(name for name, *_ in self._of_all("outputs")):
            found = (some for other, some, _ in self._of_all("outputs") if other == name)
            shapes = sorted({tuple(shape) for some in found for shape in some})
            if len(shapes) > 1:
                some = " and ".join(str(list(shape)) for shape in shapes[:2])
                raise UserError(
                    f"score {name!r}: an Output has the shapes {some} for an example; it must have one shape for every "
                    "example of the set: pad it to a fixed length"
                )
            parts = self.outputs[name]
            # a process without examples that count has no shape of its own
            nothing = parts[0].new_empty((0, *(shapes[0] if shapes else parts[0].shape[1:])))
            outputs[name] = runtime.gather_rows(torch.cat([nothing, *(part for part in parts if len(part))]))
        return outputs


def _check_shape(name: str, before: Sequence[int], shape: Sequence[int]) -> None:
    if tuple(before) != tuple(shape):
        raise UserError(
            f"score {name!r}: a Total of shape {tuple(shape)} after one of {tuple(before)}; it must have the same "
            "shape for every batch"
        )
