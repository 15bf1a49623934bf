"""torch's optimizers as the loop uses them: made and stepped without what torch wraps around them for its compiler.

torch 2.14 imports its compiler, which takes 2 s, when an optimizer is first made, and again marks graph breaks, records
a profile and looks for hooks at each step.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..distributed.blocks import is_split
from ..errors import UserError
from ..recipe.contract import Recipe

TORCH = str(Path(torch.__file__).parent)
WHOLE_MATRICES = tuple(getattr(torch.optim, name) for name in ("Adafactor", "Muon") if hasattr(torch.optim, name))


def make_optimizer(recipe: Recipe, name: str, network: nn.Module) -> Optimizer:
    """The recipe's optimizer; raises UserError where it can't be one of that network."""
    with without_compiler():
        optimizer = recipe.optimizer(name, network)
    if not isinstance(optimizer, Optimizer):
        raise UserError(
            f"recipe {recipe.name}: optimizer() gives a {type(optimizer).__name__} for {name!r}; it must give a "
            "torch.optim.Optimizer"
        )
    known = {id(parameter) for parameter in network.parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in known:
                raise UserError(
                    f"recipe {recipe.name}: the optimizer of {name!r} holds a parameter of shape "
                    f"{tuple(parameter.shape)} that is not of that network; make it a parameter of the network, or it "
                    "would not be saved"
                )
            if not is_split(network) and any(
                n > 1 and not s for n, s in zip(parameter.shape, parameter.stride(), strict=True)
            ):
                raise UserError(
                    f"recipe {recipe.name}: a parameter of {name!r} of shape {tuple(parameter.shape)} is expanded "
                    "(stride 0): its elements share memory and can't be updated; call .contiguous() first"
                )
    if is_split(network) and isinstance(optimizer, WHOLE_MATRICES):
        raise UserError(
            f"--shard fsdp: {type(optimizer).__name__} looks at whole matrices, which no process holds; use an "
            "optimizer that looks at each element by itself, such as AdamW"
        )
    if is_split(network) and isinstance(optimizer, SGD):
        for group in optimizer.param_groups:
            group["fused"] = False  # torch has no such kernel for parameters that are split
    return optimizer


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether its `step` must be given a function that computes the loss, as LBFGS's must."""
    first = next(iter(inspect.signature(optimizer.step).parameters.values()), None)
    return first is not None and first.name == "closure" and first.default is first.empty


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


def plain_step(optimizer: Optimizer) -> None:
    """What `optimizer.step()` does.

    The step of torch's own optimizers is wrapped in what marks graph breaks and records profiles, which imports the
    compiler (2 s) and takes time at each step. Where nothing else is wrapped around it, the method within is called.
    """
    function = _within(type(optimizer))
    hooks = (
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )
    if function is None or hooks or "step" in vars(optimizer) or optimizer.defaults.get("differentiable"):
        optimizer.step()
        return
    with torch.no_grad():
        function(optimizer)


def _within(kind: type[Optimizer]) -> Callable[[Optimizer], object] | None:
    """The step of a class of torch's own without torch's wrappers; None for any other class, or another's wrapper."""
    if getattr(torch.optim, kind.__name__, None) is not kind:
        return None
    function: Any = kind.step
    while function.__code__.co_filename.startswith(TORCH):
        if not hasattr(function, "__wrapped__"):
            return function
        function = function.__wrapped__
    return None
