"""torch's optimizers as the loop uses them: made and stepped without what torch wraps around them for its compiler.

torch 2.14 imports its compiler, which takes 2 s, when an optimizer is first made, and again marks graph breaks, records
a profile and looks for hooks at each step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .errors import UserError
from .recipe import Recipe


def make_optimizer(recipe: Recipe, name: str, network: nn.Module) -> Optimizer:
    """The recipe's optimizer; refuses one that needs more than a gradient."""
    with without_compiler():
        optimizer = recipe.optimizer(name, network)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UserError(
            f"recipe {recipe.name}: LBFGS evaluates the loss many times a step; the loop takes one gradient"
        )
    prefer_fused(optimizer)
    return optimizer


def prefer_fused(optimizer: Optimizer) -> None:
    """Has torch update all parameters in one kernel on a CPU, where the recipe did not choose otherwise.

    Measured (one thread, AMD EPYC): Adam takes 0.11 of the time for 1.2 million parameters and 0.29 for 6 thousand, SGD
    with momentum 0.6 and 0.4; plain SGD gains nothing. On a GPU torch's own choice stands.
    """
    if type(optimizer) not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        # of "fused" and "foreach" False is a choice too, None is none
        chosen = any(group.get(name) is not None for name in ("fused", "foreach"))
        chosen |= any(group.get(name) for name in ("capturable", "differentiable"))
        fits = all(p.device.type == "cpu" and p.is_floating_point() for p in group["params"])
        if fits and not chosen and group.get("momentum") != 0:
            group["fused"] = True


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Within it torch's optimizers don't import the compiler to exclude their own methods from being compiled."""
    mark = "__dynamo_disable"  # where torch._compile keeps the excluded form of a method
    methods: list[Any] = [Optimizer.add_param_group, Optimizer.load_state_dict, Optimizer.state_dict]
    plain = [m.__wrapped__ for m in methods if hasattr(m, "__wrapped__") and not hasattr(m.__wrapped__, mark)]
    for function in plain:
        setattr(function, mark, function)
    try:
        yield
    finally:
        for function in plain:
            delattr(function, mark)


def bare_step(optimizer: Optimizer) -> Callable[[], object]:
    """What `optimizer.step()` computes, and nothing else; the method itself for an optimizer that is not torch's own.

    An optimizer with hooks, or a differentiable one, keeps its method too.
    """
    kind = type(optimizer)
    hooks = [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks]
    if not kind.__module__.startswith("torch.optim.") or hooks or optimizer.defaults.get("differentiable"):
        return optimizer.step
    function: Any = kind.step
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__

    def step() -> None:
        with torch.no_grad():
            function(optimizer)

    return step
