"""What nndist uses of torch that torch doesn't publish, in one place; each says what happens where a release lacks it.

SEEN_ON are the releases on which tests/test_torch_internals.py has found all of it to be there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
