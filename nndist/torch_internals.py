"""What nndist uses of torch that torch doesn't publish, in one place; each says what happens where a release lacks it.

SEEN_ON are the releases on which tests/test_torch_internals.py has found all of it to be there.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

SEEN_ON = ("2.11", "2.14")

Hooks = Mapping[int, Callable[..., Any]]


def hooks_of(owner: nn.Module | Tensor | Optimizer) -> dict[str, Hooks]:
    """The hooks that were registered on a module, a parameter or an optimizer, by the name of what holds them.

    Where a release keeps them elsewhere there seem to be none: what they hold is then not saved with the run, and the
    ones on gradients, which several processes can't have, are not refused.
    """
    names: tuple[str, ...]
    if isinstance(owner, Tensor):
        names = ("_backward_hooks", "_post_accumulate_grad_hooks")
    elif isinstance(owner, Optimizer):
        names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    else:
        names = _OF_MODULES
    return {name: getattr(owner, name, None) or {} for name in names}


_OF_MODULES = tuple(sorted(name for name in vars(nn.Module()) if name.endswith("_hooks")))


def non_persistent_buffers(module: nn.Module) -> set[str]:
    """The names of the module's own buffers that are not in its state_dict; where a release can't tell, none."""
    return getattr(module, "_non_persistent_buffers_set", set())


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Within it torch's optimizers don't import the compiler to exclude their own methods from being compiled.

    That import takes 2 s (torch 2.14.1). Where a release marks excluded methods otherwise, it is imported.
    """
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
    compiler (2 s) and takes time at each step. Where nothing else is wrapped around it, the method within is called;
    where a release wraps it otherwise, `step` itself.
    """
    function = _within(type(optimizer))
    hooks = any(hooks_of(optimizer).values()) or any(_global_hooks())
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
    while function.__code__.co_filename.startswith(_TORCH):
        if not hasattr(function, "__wrapped__"):
            return function
        function = function.__wrapped__
    return None


_TORCH = str(Path(torch.__file__).parent)


def _global_hooks() -> Iterator[Any]:
    """Those that are called at the steps of every optimizer; where a release keeps them elsewhere, one that is true."""
    for name in ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"):
        yield getattr(sys.modules[Optimizer.__module__], name, True)


def backward(loss: Tensor, weights: Tensor, parameters: Collection[Tensor] = ()) -> None:
    """`loss.backward(weights)` for shapes that are known to agree; the mean's own kernels are saved.

    parameters: those that gradients are added to, instead of all. torch checks the shapes by its symbolic ones, which
    takes 0.7 s to import and 30 us a step (torch 2.14.1). Where a release lacks the engine's method, that is paid.
    """
    if _run_backward is None:
        loss.backward(weights, inputs=list(parameters) or None)
        return
    _run_backward(*((loss,), (weights,), False, False, tuple(parameters)), allow_unreachable=True, accumulate_grad=True)


_run_backward = getattr(getattr(torch.autograd.Variable, "_execution_engine", None), "run_backward", None)
