"""`--freeze`, `--unfreeze-at` and `--lr-scale`: which parts of a network are trained, from when, and how fast."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import LBFGS, Optimizer

from ..config import Interval, RunConfig
from ..errors import UserError
from ..recipe.contract import Recipe, meant


class FineTuning:
    """Freezes parameters by name, thaws them at a step, and gives groups of them rates of their own.

    A frozen parameter gets no gradient, so that its optimizer changes nothing of it, weight decay included. A BatchNorm
    all of whose parameters are frozen keeps its running statistics too. What is frozen is a function of the step.
    origins: for each optimizer whose groups were split, the recipe's group that each is a part of.
    """

    def __init__(self, recipe: Recipe, config: RunConfig, networks: Mapping[str, nn.Module], steps_per_epoch: int):
        self.origins: dict[str, list[int]] = {}
        self.optimizers: Mapping[str, Optimizer] = {}
        several = len(networks) > 1
        self.names = {
            parameter: f"{name}.{key}" if several else key
            for name, network in networks.items()
            for key, parameter in network.named_parameters()
        }
        chosen = {p for pattern in meant(recipe, "freeze") or () for p in self._matching(pattern, "--freeze")}
        self.frozen = [p for p in self.names if p in chosen and p.requires_grad]
        self.thaws_at = _steps(recipe, config, steps_per_epoch)
        self.norms = [
            module
            for network in networks.values()
            for module in network.modules()
            if isinstance(module, _BatchNorm)
            and (own := list(module.parameters(recurse=False)))
            and all(parameter in chosen for parameter in own)
        ]
        self.scales = [(self._matching(pattern, "--lr-scale"), factor) for pattern, factor in _scales(recipe)]
        self.is_frozen = False
        self._freeze(bool(self.frozen) and self.thaws_at is None)

    def begin(self, optimizers: Mapping[str, Optimizer]) -> None:
        """Freezes, once the optimizers are made, what is to thaw: many hold only what needs a gradient by then."""
        self.optimizers = optimizers
        self._freeze(bool(self.frozen))

    def before_step(self, step: int) -> None:
        """Freezes or thaws for optimizer step `step`, counted from 0; raises UserError if no optimizer has it."""
        if not self.frozen:
            return
        wanted = self.thaws_at is None or step < self.thaws_at
        if wanted != self.is_frozen:
            self._freeze(wanted)
            if step == self.thaws_at and (left := self._of_no_optimizer()):
                raise UserError(
                    f"--unfreeze-at: {left[0]} thaws at step {self.thaws_at:,} and no optimizer holds it, so it would "
                    "not be trained; give it to one in optimizer(), or with add_param_group() by then"
                )
        if wanted:
            for module in self.norms:
                module.training = False  # `network.train()` was called since, as before the first step

    def notes(self) -> list[str]:
        """What the plan says."""
        lines = []
        if self.frozen:
            until = "" if self.thaws_at is None else f" until step {self.thaws_at:,}"
            norms = f", with the statistics of {len(self.norms)} BatchNorms" if self.norms else ""
            lines.append(f"frozen{until}: {len(self.frozen):,} of {len(self.names):,} tensors{norms}")
        if self.frozen and self.thaws_at is not None and (left := self._of_no_optimizer()):
            lines.append(f"{left[0]} thaws at step {self.thaws_at:,}; as yet no optimizer holds it")
        lines += [f"learning rate x {factor:g}: {len(parameters):,} tensors" for parameters, factor in self.scales]
        return lines

    def with_rates(self, name: str, optimizer: Optimizer) -> Optimizer:
        """The optimizer, with parameter groups split by `--lr-scale`; the first pattern that matches counts."""
        if not self.scales:
            return optimizer
        every = _with_inner(optimizer)
        if any(isinstance(one, LBFGS) for one in every):
            raise UserError("--lr-scale: LBFGS has one learning rate for all; leave the flag out")
        lists = {id(one.param_groups): one.param_groups for one in every}  # some share theirs
        groups: list[dict[str, Any]] = []
        origins: list[int] = []
        for number, group in enumerate(list(optimizer.param_groups)):
            parts: dict[float, list[nn.Parameter]] = {1.0: []}
            for parameter in group["params"]:
                factor = next((factor for matching, factor in self.scales if parameter in matching), 1.0)
                parts.setdefault(factor, []).append(parameter)
            first, *others = (
                {**group, "params": parameters, "lr": group["lr"] * factor}
                for factor, parameters in parts.items()
                if parameters or not group["params"]
            )
            group.update(first)  # in place: an optimizer that this one wraps may hold it, too
            for held in lists.values():
                at = next((at for at, one in enumerate(held) if one is group), None)
                if at is not None:
                    held[at + 1 : at + 1] = others
            groups += [group, *others]
            origins += [number] * (1 + len(others))
        known = {id(group) for group in groups}
        are_set = [*map(id, optimizer.param_groups)] == [*map(id, groups)]
        if not are_set or any(id(group) not in known for one in every for group in one.param_groups):
            raise UserError(
                f"--lr-scale: {type(optimizer).__name__} has parameter groups that can't be split from outside; leave "
                "the flag out and give the groups their rates in optimizer()"
            )
        self.origins[name] = origins
        return optimizer

    def _freeze(self, frozen: bool) -> None:
        self.is_frozen = frozen
        for parameter in self.frozen:
            parameter.requires_grad_(not frozen)
        for module in self.norms:
            module.training = not frozen

    def _of_no_optimizer(self) -> list[str]:
        """The names of frozen parameters that are in no group of an optimizer."""
        groups = [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]
        held = {id(parameter) for group in groups for parameter in group["params"]}
        return [self.names[parameter] for parameter in self.frozen if id(parameter) not in held]

    def _matching(self, pattern: str, flag: str) -> set[nn.Parameter]:
        """The parameters of a name or pattern, or of the module of that name; raises UserError if there are none."""
        found = {
            parameter
            for parameter, name in self.names.items()
            if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")
        }
        if not found:
            modules = list(dict.fromkeys(name.split(".")[0] for name in self.names.values()))
            raise UserError(
                f"{flag} {pattern!r}: matches no parameter; their names begin with {', '.join(modules[:12])}"
            )
        return found


def _with_inner(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer and those that it wraps, in attributes or in lists or dicts there."""
    found, new = [optimizer], [optimizer]
    while new:
        values = [*vars(new.pop()).values()]
        values += [item for value in values if isinstance(value, list | tuple) for item in value]
        values += [item for value in values if isinstance(value, dict) for item in value.values()]
        for value in values:
            if isinstance(value, Optimizer) and not any(value is one for one in found):
                found.append(value)
                new.append(value)
    return found


def _steps(recipe: Recipe, config: RunConfig, steps_per_epoch: int) -> int | None:
    """The optimizer step at which frozen parameters thaw; None for never."""
    when = meant(recipe, "unfreeze_at")
    if when is None:
        return None
    if not meant(recipe, "freeze"):
        raise UserError(f"--unfreeze-at {when!r}: nothing is frozen; say what with --freeze")
    steps = Interval.parse(when, "--unfreeze-at").in_steps(steps_per_epoch)
    if steps is None:
        raise UserError(f"--unfreeze-at {when!r}: must be in steps or epochs, so that runs agree")
    for flag, value, usual in (("gradient-sync", config.gradient_sync, "step"), ("shard", config.shard, "none")):
        if value != usual:
            raise UserError(f"--unfreeze-at: --{flag} {value} needs the same parameters throughout; leave one out")
    return steps


def _scales(recipe: Recipe) -> Sequence[tuple[str, float]]:
    """The patterns and factors of `--lr-scale`; raises UserError for anything but pattern=factor."""
    found = []
    for text in meant(recipe, "lr_scale") or ():
        pattern, _, factor = text.rpartition("=")
        try:
            number = float(factor)
        except ValueError:
            number = -1.0
        if not pattern or not 0 <= number < float("inf"):
            raise UserError(f"--lr-scale {text!r}: give a pattern and a factor, such as 'layer1.*=0.1'")
        found.append((pattern, number))
    return found
