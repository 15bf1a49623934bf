"""Creates and validates a recipe's optimizers."""

from __future__ import annotations

import inspect

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
