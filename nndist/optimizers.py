"""torch's optimizers as the loop uses them: made and stepped without what torch wraps around them for its compiler.

torch 2.14 imports its compiler, which takes 2 s, when an optimizer is first made, and again marks graph breaks, records
a profile and looks for hooks at each step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

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
    if type(optimizer) not in (SGD, Adam, AdamW):
        return
    for group in optimizer.param_groups:
        # of "fused" and "foreach" False is a choice too, None is none
        chosen = any(group.get(name) is not None for name in ("fused", "foreach"))
        chosen |= any(group.get(name) for name in ("capturable", "differentiable"))
        fits = all(p.device.type == "cpu" and p.is_floating_point() for p in group["params"])
        if fits and not chosen and group.get("momentum") != 0:
            group["fused"] = True


def obstacle_to_replay(optimizer: Optimizer) -> str:
    """Why the steps of an optimizer can't be captured as a CUDA graph, or ""."""
    if getattr(torch.optim, type(optimizer).__name__, None) is not type(optimizer):
        return "is not one of torch's own"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "has hooks"
    if type(optimizer) not in (SGD, Adam, AdamW) and "capturable" not in optimizer.defaults:
        return "looks at values that are on the GPU"
    if any(isinstance(group["lr"], Tensor) or group.get("differentiable") for group in optimizer.param_groups):
        return "has a learning rate that is a tensor, or is differentiable"
    return ""


def make_replayable(optimizer: Optimizer, device: torch.device) -> None:
    """Has an optimizer that has not taken a step read its learning rate and its counters from tensors on the device."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], device=device)
        if type(optimizer) in (SGD, Adam, AdamW):  # SGD's other kernels would look at the learning rate
            group |= {"fused": True, "foreach": False}
        if "capturable" in group:
            group["capturable"] = True


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

    An optimizer with hooks, or a differentiable one, keeps its method too. Where all of it is one kernel per group,
    that is called directly.
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

    return _DirectStep(optimizer, step) if _is_direct(optimizer) else step


def _is_direct(optimizer: Optimizer) -> bool:
    """Whether `_DirectStep` knows what the optimizer computes."""
    odd = ("amsgrad", "maximize", "capturable", "differentiable", "foreach")
    for group in optimizer.param_groups:
        if any(group.get(name) for name in odd) or isinstance(group["lr"], Tensor):
            return False
        plain = type(optimizer) is SGD and not group["fused"] and group["momentum"] == group["weight_decay"] == 0
        fused = type(optimizer) in (SGD, Adam, AdamW) and group["fused"] and group.get("momentum") != 0
        if not (plain or fused) or any(p.device.type != "cpu" or p.is_sparse for p in group["params"]):
            return False
        if len({p.dtype for p in group["params"]}) != 1:
            return False
    return True


class _DirectStep:
    """The step of an SGD, Adam or AdamW whose whole update of a group is one kernel, on a CPU: that kernel.

    What torch does around it at each step, collecting lists and counting the steps of each parameter, takes longer than
    the kernel does for small networks (measured: Adam on six tensors 50 us, so 20). Where some parameter has no
    gradient, and at the first step, which makes the state, torch's own step is taken.
    """

    def __init__(self, optimizer: Optimizer, step: Callable[[], None]):
        self.optimizer = optimizer
        self.step = step
        self.groups = [(group, list(group["params"])) for group in optimizer.param_groups]
        self.stateless = all(not group.get("momentum", True) for group in optimizer.param_groups)
        self._states: list[list[dict[str, Any]]] = []
        self._lists: list[dict[str, Any]] = []

    def __call__(self) -> None:
        gradients = [[p.grad for p in parameters] for _, parameters in self.groups]
        if any(g is None or g.is_sparse for of_group in gradients for g in of_group) or not self._ready():
            self.step()
            return
        with torch.no_grad():
            for (group, parameters), of_group, lists in zip(self.groups, gradients, self._lists, strict=True):
                self._update(group, parameters, of_group, lists)

    def _update(self, group: dict[str, Any], parameters: list[Tensor], gradients: Any, lists: dict[str, Any]) -> None:
        if self.stateless:
            torch._foreach_add_(parameters, gradients, alpha=-group["lr"])
            return
        common = {"lr": group["lr"], "weight_decay": group["weight_decay"], "maximize": False}
        common |= {"grad_scale": None, "found_inf": None}
        if isinstance(self.optimizer, SGD):
            torch._fused_sgd_(
                *(parameters, gradients, lists["momentum_buffer"]),
                momentum=group["momentum"],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                is_first_step=False,
                **common,
            )
            return
        lists["count"].add_(1)
        fused = torch._fused_adamw_ if group.get("decoupled_weight_decay", False) else torch._fused_adam_
        fused(
            *(parameters, gradients, lists["exp_avg"], lists["exp_avg_sq"], [], lists["step"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            amsgrad=False,
            **common,
        )

    def _ready(self) -> bool:
        """Whether the lists are those of the optimizer's present state, which a resume replaces."""
        if self.stateless:
            self._lists = self._lists or [{} for _ in self.groups]
            return True
        state = self.optimizer.state
        if self._lists and state.get(self.groups[0][1][0]) is self._states[0][0]:
            return True
        if any(not state.get(p) for _, parameters in self.groups for p in parameters):
            return False
        self._states = [[state[p] for p in parameters] for _, parameters in self.groups]
        self._lists = []
        for states in self._states:
            lists: dict[str, Any] = {}
            if "step" in states[0]:  # one tensor of all counters, which each of them is a view of
                lists["count"] = torch.stack([s["step"] for s in states])
                for number, s in enumerate(states):
                    s["step"] = lists["count"][number]
            self._lists.append({**lists, **{name: [s[name] for s in states] for name in states[0]}})
        return True
