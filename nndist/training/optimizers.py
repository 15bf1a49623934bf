"""Creates and validates a recipe's optimizers, and watches that they stay those of the run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn
from torch.optim import SGD, Optimizer

from ..distributed.blocks import is_sharded
from ..errors import UserError
from ..recipe.contract import Recipe
from ..torch_internals import without_compiler


def make_optimizer(recipe: Recipe, name: str, network: nn.Module) -> Optimizer:
    """The recipe's optimizer for a network; raises UserError if it does not fit that network."""
    with without_compiler():
        optimizer = recipe.optimizer(name, network)
    if not isinstance(optimizer, Optimizer):
        raise UserError(
            f"recipe {recipe.name}: optimizer() returns a {type(optimizer).__name__} for {name!r}; it must return a "
            "torch.optim.Optimizer"
        )
    known = {id(parameter) for parameter in network.parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in known:
                raise UserError(
                    f"recipe {recipe.name}: the optimizer of {name!r} holds a parameter of shape "
                    f"{tuple(parameter.shape)} that is not in that network; make it a parameter of the network, or it "
                    "would not be saved"
                )
            if not is_sharded(network) and any(
                n > 1 and not s for n, s in zip(parameter.shape, parameter.stride(), strict=True)
            ):
                raise UserError(
                    f"recipe {recipe.name}: a parameter of {name!r} of shape {tuple(parameter.shape)} is expanded "
                    "(stride 0): its elements share memory and can't be updated; call .contiguous() first"
                )
    if is_sharded(network) and isinstance(optimizer, SGD):
        for group in optimizer.param_groups:
            group["fused"] = False  # torch has no such kernel for sharded parameters
    return optimizer


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether its `step` requires a closure that computes the loss, as LBFGS's does."""
    first = next(iter(inspect.signature(optimizer.step).parameters.values()), None)
    return first is not None and first.name == "closure" and first.default is first.empty


def closures_after_backward(recipe: Recipe, optimizers: Mapping[str, Optimizer]) -> set[str]:
    """The networks of `closure_after_backward`; raises UserError unless it is a tuple of names."""
    names = recipe.closure_after_backward
    unknown = [name for name in names if name not in optimizers] if isinstance(names, tuple) else [names]
    if unknown:
        raise UserError(
            f"recipe {recipe.name}: closure_after_backward has {unknown[0]!r}; it must be a tuple of names of networks"
            f", such as ({next(iter(optimizers))!r},)"
        )
    return set(names)


def may_start_from_gradients(optimizer: Optimizer) -> bool:
    """Whether an optimizer that requires a closure is a user's own: it may need gradients before, as SAM does."""
    return needs_closure(optimizer) and not type(optimizer).__module__.startswith(("torch.optim", "nndist."))


def has_own_zero_grad(optimizer: Optimizer) -> bool:
    """Whether a class or an instance overrides `zero_grad`."""
    return type(optimizer).zero_grad is not Optimizer.zero_grad or "zero_grad" in vars(optimizer)


def is_for_want_of_closure(optimizer: Optimizer, error: Exception) -> bool:
    """Whether `step()` failed because it was called without a closure."""
    has_one = "closure" in inspect.signature(optimizer.step).parameters
    return has_one and any(text in str(error) for text in ("closure", "'NoneType' object is not callable"))


class KeptOptimizers:
    """The attributes of a recipe and its networks that hold the run's optimizers, and must go on to do so."""

    def __init__(self, recipe: Recipe, networks: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]):
        self.recipe = recipe
        self._of_run = {id(optimizer): name for name, optimizer in optimizers.items()}
        self._held = [
            (owner, attribute, self._of_run[id(value)])
            for owner in (recipe, *(module for network in networks.values() for module in network.modules()))
            for attribute, value in vars(owner).items()
            if id(value) in self._of_run
        ]

    def check(self, step: int) -> None:
        """Raises UserError if training has put another optimizer into one, which would never take a step."""
        for owner, attribute, name in self._held:
            value = getattr(owner, attribute, None)
            if isinstance(value, Optimizer) and id(value) not in self._of_run:
                raise UserError(
                    f"recipe {self.recipe.name}: {attribute} has become another optimizer, {type(value).__name__}, by "
                    f"step {step:,}, and the run keeps that which optimizer() returned for {name!r}; change its "
                    "param_groups, or return one that switches within its step()"
                )
