"""Optimizers that need full matrices, such as Muon, on sharded networks: one process takes each parameter's step."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ..distributed.aside import gathered_objects, gathered_rows, scattered_rows
from ..distributed.blocks import local, sharded_as
from ..torch_internals import plain_step

WHOLE_MATRICES = tuple(getattr(torch.optim, name) for name in ("Adafactor", "Muon") if hasattr(torch.optim, name))
"""torch's optimizers whose update of an element depends on others of its tensor."""


@torch.no_grad()
def whole_step(optimizer: Optimizer) -> None:
    """Takes a step of one of WHOLE_MATRICES on sharded parameters, with the numbers of unsharded ones. A collective.

    A parameter, its gradient and its state are gathered on one process, which takes the step and sends the shards
    back; the processes do so for one parameter each at a time. State with the parameter's shape stays sharded between
    steps; all processes keep the rest, such as Adafactor's row sums, which is small.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    due = [(group, p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    for start in range(0, len(due), world_size):
        turn = due[start : start + world_size]
        own: tuple[Tensor, dict[str, Any]] | None = None
        for owner, (group, parameter) in enumerate(turn):
            whole, gradient = _gathered(parameter, owner), _gathered(parameter.grad, owner)
            state = {key: _gathered(value, owner) for key, value in optimizer.state[parameter].items()}
            if whole is not None:
                whole.grad = gradient
                own = whole, _stepped(optimizer, group, whole, state)
                whole.grad = None
        for owner, (_, parameter) in enumerate(turn):
            whole, state = own if own is not None and owner == rank else (None, {})
            _send(parameter, whole, owner, parameter.device)
            held = optimizer.state[parameter]
            if not held:  # the first step: only the owner knows what the state consists of
                _make_state(held, parameter, state, owner, world_size)
            for key in held:
                _send(held[key], state.get(key), owner, parameter.device)


def _stepped(optimizer: Optimizer, group: dict[str, Any], whole: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """Changes a full tensor as the optimizer does, with the options of its group; returns its state afterwards."""
    one = copy.copy(optimizer)  # of the same class; hooks and schedulers stay with the original
    one.param_groups = [{**group, "params": [whole]}]
    one.state = defaultdict(dict, {whole: state} if state else {})
    plain_step(one)
    return one.state[whole]


def _make_state(held: dict[str, Any], parameter: Tensor, state: dict[str, Any], owner: int, world_size: int) -> None:
    """Makes room for the state that the owner's first step has made."""
    kinds = [[key, str(value.dtype).removeprefix("torch."), list(value.shape)] for key, value in state.items()]
    for key, dtype, shape in gathered_objects(kinds, world_size, parameter.device)[owner]:
        kind = getattr(torch, dtype)
        if torch.Size(shape) == parameter.shape:
            held[key] = sharded_as(parameter, torch.zeros_like(local(parameter), dtype=kind))
        else:
            held[key] = torch.zeros(shape, dtype=kind, device="cpu" if not shape else parameter.device)


def _gathered(tensor: Any, owner: int) -> Tensor | None:
    """The full tensor on process `owner`; None on the others. A collective for sharded tensors."""
    if hasattr(tensor, "to_local"):
        return gathered_rows(local(tensor).contiguous(), tensor.shape[0], owner)
    return tensor.clone() if dist.get_rank() == owner else None


def _send(tensor: Any, whole: Tensor | None, owner: int, device: torch.device) -> None:
    """Puts the owner's full tensor into what each process holds of it. A collective, on the processes' device."""
    part = local(tensor)
    if hasattr(tensor, "to_local"):
        part.copy_(scattered_rows(whole, part, tensor.shape[0], owner))
        return
    sent = part.to(device) if whole is None else whole.to(device)  # a counter of steps is on the CPU
    dist.broadcast(sent, owner)
    part.copy_(sent)
