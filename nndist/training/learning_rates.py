"""The learning rates of a run: the recipe's own, times its schedule's factor, or as torch's schedulers set them."""

from __future__ import annotations

import bisect
import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from ..directions import direction_of
from ..errors import UserError
from ..recipe.contract import Recipe
from ..runs.python_values import Unsavable, decode, encode
from ..torch_internals import without_compiler

OF_THE_STEP = (LambdaLR, OneCycleLR, CosineAnnealingWarmRestarts)
"""Schedulers whose rates follow from the number of the step, beside those of which torch has a closed form."""


class LearningRates:
    """Sets the learning rates of all optimizers before each step.

    A rate is written only when its factor changes: under a constant schedule the recipe may set the rates itself.
    """

    def __init__(
        self,
        recipe: Recipe,
        optimizers: Mapping[str, Optimizer],
        total_steps: int,
        origins: Mapping[str, Sequence[int]] | None = None,
    ):
        """origins: for each optimizer whose groups were split, the recipe's group that each is a part of."""
        self.recipe, self.optimizers, self.origins = recipe, optimizers, origins or {}
        self.factors: dict[str, list[float]] = {name: [] for name in optimizers}
        self._written: dict[str, list[float]] = {}
        self.total_steps = total_steps
        self.schedulers: dict[str, Any] = {}
        self._made: dict[str, Any] = {}  # their states as they were made
        for name, optimizer in optimizers.items():
            with without_compiler():
                scheduler = recipe.scheduler(name, optimizer, total_steps)
            if scheduler is None:
                continue
            if not isinstance(scheduler, LRScheduler) or scheduler.optimizer is not optimizer:
                raise UserError(
                    f"recipe {recipe.name}: scheduler() must return a torch.optim.lr_scheduler of the optimizer of "
                    f"{name!r}, or None; it returns a {type(scheduler).__name__}"
                )
            if recipe.schedule != "constant":
                raise UserError(
                    f"--schedule {recipe.schedule}: recipe {recipe.name} has a scheduler() of its own; leave it out"
                )
            if isinstance(scheduler, ReduceLROnPlateau):
                self._check_mode(scheduler)
            self.schedulers[name] = scheduler
            try:
                self._made[name] = {
                    key: copy.deepcopy(value) for key, value in _values(scheduler).items() if not _has_tensors(value)
                }
            except Unsavable:
                raise UserError(
                    f"recipe {recipe.name}: the state of its {type(scheduler).__name__} can't be saved without pickle; "
                    "use another scheduler, or lr_factor()"
                ) from None

    @property
    def first(self) -> float:
        """The learning rate of the first network's first parameter group, for the next step."""
        optimizer = next(iter(self.optimizers.values()))
        return float(optimizer.param_groups[0]["lr"])

    def before_step(self, step: int, total_steps: int) -> None:
        """Sets the rates of optimizer step `step`, counted from 0."""
        factor = self.recipe.lr_factor(step, total_steps)
        for name, optimizer in self.optimizers.items():
            factors = self._per_group(name, factor, len(optimizer.param_groups))
            before = self.factors[name] + [1.0] * len(factors)  # training may have added groups
            changed = [one != other for one, other in zip(factors, before, strict=False)]
            if any(changed):
                self._write(name, factors, changed)
            self.factors[name] = factors

    def after_step(self) -> None:
        """Steps the schedulers that count optimizer steps."""
        for scheduler in self._of("step"):
            scheduler.step()

    def after_epoch(self) -> None:
        """Steps the schedulers that count epochs."""
        for scheduler in self._of("epoch"):
            scheduler.step()

    def after_evaluation(self, scores: Mapping[str, float]) -> None:
        """Steps the schedulers that monitor a score: see `scheduler_monitors`."""
        monitored = self._monitored or ("test/loss" if "test/loss" in scores else "val/loss")
        for scheduler in self._of("evaluation"):
            if monitored not in scores:
                raise UserError(
                    f"recipe {self.recipe.name}: its scheduler monitors {monitored}, which is not a score; name one "
                    f"with {'scheduler_monitors' if self.recipe.scheduler_monitors else '--best'}, such as "
                    f"{next(iter(scores), 'test/loss')}"
                )
            scheduler.step(scores[monitored])

    def scale(self, factor: float) -> None:
        """Sets every rate to the recipe's own times a factor, for measurements before training."""
        for name, optimizer in self.optimizers.items():
            self._written.pop(name, None)
            groups = optimizer.param_groups
            self._write(name, [factor] * len(groups), [True] * len(groups))

    def own(self, name: str) -> float:
        """The recipe's own rate of a network's first parameter group."""
        group = self.optimizers[name].param_groups[0]
        return float(group.get("initial_lr", group["lr"]))

    def functions(self) -> dict[str, Any]:
        """The functions that the schedulers were given, by name: they may keep something."""
        return {
            f"schedulers[{name!r}]{place}": function
            for name, scheduler in self.schedulers.items()
            for place, function in _functions_of(scheduler, "")
        }

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint: plain values, which later steps do not change."""
        saved: dict[str, Any] = {"factors": {**self.factors}, "schedulers": {}, "tensors": {}, "settings": {}}
        saved["total_steps"] = self.total_steps
        for name, scheduler in self.schedulers.items():
            tensors: dict[str, torch.Tensor] = {}
            saved["schedulers"][name] = encode(_values(scheduler), tensors)
            saved["settings"][name] = [*_unchanged(self._made[name], _values(scheduler))]
            # of rates that are tensors
            saved["tensors"][name] = {
                key: [str(tensor.dtype), encode(tensor.tolist(), None)] for key, tensor in tensors.items()
            }
        return saved

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restores what `state` returned; call it after the optimizers are restored.

        If --epochs is another one, what steps do not change of a schedule, such as its length, is as the recipe's
        scheduler has it now.
        """
        self.factors = {name: list(saved["factors"].get(name, [])) for name in self.optimizers}
        self._written = {}
        for name, scheduler in self.schedulers.items():
            if name in saved["schedulers"]:
                groups = self.optimizers[name].param_groups
                device = next(parameter.device for group in groups for parameter in group["params"])
                tensors = {
                    key: torch.tensor(decode(values, {}, None), dtype=getattr(torch, dtype.removeprefix("torch.")))
                    for key, (dtype, values) in saved.get("tensors", {}).get(name, {}).items()
                }
                on_device = {key: tensor.to(device) for key, tensor in tensors.items()}
                values, now = decode(saved["schedulers"][name], on_device, None), _values(scheduler)
                is_other_length = saved.get("total_steps", self.total_steps) != self.total_steps
                for path in saved["settings"][name] if is_other_length else ():
                    _take(values, now, path)
                scheduler.load_state_dict(values)
                if is_other_length:
                    _set_to(scheduler, scheduler.last_epoch)

    @property
    def _monitored(self) -> str | None:
        """The score that the recipe names to be monitored; None means the loss."""
        return self.recipe.scheduler_monitors or self.recipe.best

    def _check_mode(self, scheduler: ReduceLROnPlateau) -> None:
        """Raises UserError if a scheduler waits for the score that it monitors to get worse."""
        score = self._monitored or "test/loss"
        direction = (self.recipe.best_is if score == self.recipe.best else None) or direction_of(score)
        right = {"highest": "max", "lowest": "min", None: scheduler.mode}[direction]
        if scheduler.mode != right:
            other = f"{score.partition('/')[0]}/{'loss' if right == 'max' else 'accuracy'}"
            raise UserError(
                f"recipe {self.recipe.name}: its ReduceLROnPlateau has mode {scheduler.mode!r} and monitors {score}, "
                f"which is best where it is {direction}; give it mode={right!r}, or let it monitor another score, such "
                f"as scheduler_monitors = {other!r} in the recipe's class"
            )

    def _of(self, when: str) -> list[Any]:
        return [
            scheduler
            for scheduler in self.schedulers.values()
            if when == ("evaluation" if isinstance(scheduler, ReduceLROnPlateau) else self.recipe.scheduler_every)
        ]

    def _per_group(self, name: str, factor: Any, num_groups: int) -> list[float]:
        if isinstance(factor, Mapping):
            factor = factor.get(name, 1.0)
        factors = [*map(float, factor)] if isinstance(factor, Sequence) else [float(factor)] * num_groups
        if isinstance(factor, Sequence) and (origins := self.origins.get(name)):
            num_own = max(origins) + 1
            if len(factors) - num_own == num_groups - len(origins):  # groups that training added come last
                factors = [*(factors[number] for number in origins), *factors[num_own:]]
        if len(factors) != num_groups:
            raise UserError(
                f"recipe {self.recipe.name}: lr_factor() returns {len(factors)} factors, and the optimizer of {name!r} "
                f"has {num_groups} parameter groups"
            )
        return factors

    def _write(self, name: str, factors: Sequence[float], changed: Sequence[bool]) -> None:
        groups = self.optimizers[name].param_groups
        if name in self.schedulers:
            raise UserError(
                f"recipe {self.recipe.name}: {name!r} has both a scheduler() and an lr_factor() that changes; use one"
            )
        written = self._written.get(name)
        now = [float(group["lr"]) for group in groups]
        if written is not None and now[: len(written)] != written:
            raise UserError(
                f"recipe {self.recipe.name}: it has set the learning rate of {name!r} itself, and so does its "
                "schedule; use --schedule constant, or leave the rate to the schedule"
            )
        for group, factor, is_new in zip(groups, factors, changed, strict=True):
            if not is_new:
                continue
            lr = float(group.setdefault("initial_lr", float(group["lr"]))) * factor
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self._written[name] = [float(group["lr"]) for group in groups]


def _values(scheduler: Any) -> dict[str, Any]:
    """A scheduler's state without its functions, which the recipe recreates."""
    return {key: value for key, value in scheduler.state_dict().items() if not callable(value)}


def _has_tensors(value: Any) -> bool:
    """Whether there are tensors within a value; raises Unsavable if it can't be saved."""
    tensors: dict[str, torch.Tensor] = {}
    encode(value, tensors)
    return bool(tensors)


def _unchanged(made: Any, now: Any, path: tuple[str | int, ...] = ()) -> Iterator[list[str | int]]:
    """Where a scheduler's state is as it was made, with nothing in it that steps have changed; rates don't count."""
    if isinstance(now, dict) and isinstance(made, dict):
        for key in sorted((now.keys() & made.keys()) - {"base_lrs", "_last_lr"}, key=str):
            if isinstance(key, str):
                yield from _unchanged(made[key], now[key], (*path, key))
    elif isinstance(now, list) and any(isinstance(item, dict) for item in now) and made != now:
        for number, pair in enumerate(zip(made, now, strict=False)):  # of schedulers within this one
            yield from _unchanged(*pair, (*path, number))
    elif made == now:
        yield [*path]


def _set_to(scheduler: Any, step: int) -> None:
    """Sets the rates to those of a step, counted from 0, where they follow from it alone; else they stay.

    The rate that the schedule had before its length changed would else stay for a step, or, if it was 0, for good.
    """
    if isinstance(scheduler, SequentialLR):
        number = bisect.bisect_right(scheduler._milestones, step)
        _set_to(scheduler._schedulers[number], step - (scheduler._milestones[number - 1] if number else 0))
    elif hasattr(scheduler, "_get_closed_form_lr") or isinstance(scheduler, OF_THE_STEP):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the number of the step is deprecated for what users write
            scheduler.step(step)


def _take(values: Any, now: Any, path: Sequence[str | int]) -> None:
    """Gives one place of a state the value that it has now, if there is such a place in both."""
    try:
        for key in path[:-1]:
            values, now = values[key], now[key]
        values[path[-1]] = now[path[-1]]
    except (LookupError, TypeError):
        return


def _functions_of(value: Any, place: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The functions within a scheduler, those within it included, and where; not objects, whose state it saves."""
    if isinstance(value, FunctionType | MethodType | partial):
        if not str(getattr(value, "__module__", "")).startswith("torch."):
            yield place, value
    elif isinstance(value, LRScheduler | ReduceLROnPlateau):
        for key, item in sorted(vars(value).items()):
            if key != "optimizer":
                yield from _functions_of(item, f"{place}.{key}", depth + 1)
    elif isinstance(value, list | tuple) and depth < 9:
        for number, item in enumerate(value):
            yield from _functions_of(item, f"{place}[{number}]", depth + 1)
