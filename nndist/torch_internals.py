"""torch's private interfaces that nndist uses, in one place; each says what happens if a release lacks it.

SEEN_ON: the releases on which tests/test_torch_internals.py has found all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

SEEN_ON = ("2.11", "2.14")

Hooks = Mapping[int, Callable[..., Any]]


def hooks_of(owner: nn.Module | Tensor | Optimizer) -> dict[str, Hooks]:
    """The hooks registered on a module, a parameter or an optimizer, by the attribute that holds them.

    If a release keeps them elsewhere there seem to be none: their state is then not saved with the run, and gradient
    hooks, which several processes can't have, are not refused.
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

OF_OPTIMIZERS = {
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
    "_zero_grad_profile_name",
    "_warned_capturable_if_run_uncaptured",
    "_need_device_dtype_check_for_fused",
    "_step_supports_amp_scaling",
    "_opt_called",
}
"""What torch itself sets on an optimizer beside its groups, state and defaults: no state of a recipe. A release's own
flag that is missing here is saved with the run if it changes, which does no harm."""


def non_persistent_buffers(module: nn.Module) -> set[str]:
    """The names of the module's own non-persistent buffers; none if a release can't tell."""
    return getattr(module, "_non_persistent_buffers_set", set())


COMPILED_CALL = "_compiled_call_impl"
"""Where `nn.Module.compile` keeps the compiled form of a module's call; None in the class. `--compile` puts it there
in training passes only. If a release keeps it elsewhere, `--compile` fails at its first step or is without effect."""


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Context manager: torch's optimizers don't import the compiler just to exclude their methods from compilation.

    That import takes 2 s (torch 2.14.1). If a release marks excluded methods differently, it is imported.
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
    """Does what `optimizer.step()` does, without torch's wrappers.

    torch wraps its own optimizers' step to mark graph breaks and record profiles, which imports the compiler (2 s) and
    takes time at each step. If nothing else wraps it, the inner method is called; if a release wraps it differently,
    `step` itself.
    """
    function = _within(type(optimizer))
    hooks = any(hooks_of(optimizer).values()) or any(_global_hooks())
    if function is None or hooks or "step" in vars(optimizer) or optimizer.defaults.get("differentiable"):
        optimizer.step()
        return
    with torch.no_grad():
        function(optimizer)


def _within(kind: type[Optimizer]) -> Callable[[Optimizer], object] | None:
    """The unwrapped step of one of torch's own classes; None for any other class, or if others wrap it too."""
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
    """The hooks on the steps of all optimizers; if a release keeps them elsewhere, True."""
    for name in ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"):
        yield getattr(sys.modules[Optimizer.__module__], name, True)


def backward(loss: Tensor, weights: Tensor, parameters: Collection[Tensor] = ()) -> None:
    """`loss.backward(weights)` without torch's comparison of their shapes, which must agree.

    weights: the factor of each element of `loss`, so that its mean needs no kernel. parameters: those that get
    gradients; none means all. The comparison is symbolic: 0.7 s for an import, and 30 us a step (torch 2.14.1). If a
    release lacks the engine's method, that cost is paid.
    """
    if _run_backward is None:
        loss.backward(weights, inputs=list(parameters) or None)
        return
    retain_graph = create_graph = False  # by position: the engine has its own names for these
    _run_backward(
        (loss,),
        (weights,),
        retain_graph,
        create_graph,
        tuple(parameters),
        allow_unreachable=True,
        accumulate_grad=True,
    )


_run_backward = getattr(getattr(torch.autograd.Variable, "_execution_engine", None), "run_backward", None)


class Unaveraged(NamedTuple):
    """A cross-entropy of reduction="none" whose mean torch would not divide by the number of its targets.

    is_weighted: whether it has weights of classes. ignored: its `ignore_index`, if a target is that, else None.
    """

    is_weighted: bool
    ignored: int | None


def unaveraged_cross_entropies(losses: Tensor) -> Iterator[Unaveraged]:
    """The cross-entropies (cross_entropy or nll_loss) that losses are made of which have weights or ignored targets.

    Read from what autograd keeps for the backward pass, so that no computation is watched or changed. Those that the
    recipe has added up, to divide by a number of its own, are left out. What has hooks, as within
    torch.utils.checkpoint, is not seen, nor what a compiler has made; if a release keeps it elsewhere, nothing is.
    """
    ahead: deque[tuple[Any, bool]] = deque([(losses.grad_fn, False)])
    seen: set[tuple[Any, bool]] = set()
    while ahead and len(seen) < _MOST_NODES:
        node, is_summed = ahead.popleft()
        if node is None or (node, is_summed) in seen:
            continue
        seen.add((node, is_summed))
        if not node.name().startswith("NllLoss"):
            summed = is_summed or node.name().startswith("SumBackward")
            ahead.extend((following, summed) for following, _ in node.next_functions)
        elif getattr(node, "_saved_reduction", None) == 0:  # "none"
            kept: list[Any] = [getattr(node, f"_raw_saved_{name}", None) for name in ("target", "weight")]
            if any(getattr(one, "unpack_hook", one) is not None for one in kept):
                continue  # a checkpoint would run its part of the network again
            target, weight = node._saved_target, node._saved_weight
            if is_summed and target.numel() != losses.numel():
                continue
            index = node._saved_ignore_index
            index -= 2**64 if index >= 2**63 else 0  # torch gives it without a sign
            found = Unaveraged(weight is not None, index if bool((target == index).any()) else None)
            if found != (False, None):
                yield found


_MOST_NODES = 10_000
"""Nodes of autograd's graph that are looked at: losses lie near its top."""


def record_collectives() -> None:
    """Asks torch to keep its flight recorder, the last collectives of this process; before the first process group.

    NCCL is kept from writing it by itself on a timeout, as that file is a pickle. A release that does not know the
    variables keeps what it keeps by default.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", os.environ.get("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000"))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")


def recorded_collectives() -> dict[str, Any]:
    """What the flight recorders hold, as JSON values: the last collectives, oldest first, with sizes and states.

    NCCL writes to a recorder of its own. gloo's entries (torch 2.14.1) say whether a collective has ended, NCCL's also
    when it started and ended on the device. {} if a release lacks them, or nothing was recorded.
    """
    found: dict[str, Any] = {}
    for recorder, function in (("nccl", "_dump_nccl_trace_json"), ("gloo", "_dump_fr_trace_json")):
        with contextlib.suppress(ImportError, AttributeError, RuntimeError, TypeError, ValueError):
            from torch._C import _distributed_c10d as internals  # missing in a build without it

            recorded = json.loads(getattr(internals, function)())
            if recorded.get("entries"):
                found[recorder] = recorded
    return found
