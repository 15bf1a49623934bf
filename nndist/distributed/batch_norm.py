"""BatchNorm with the statistics of the global batch, however many processes share it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError

OVER_PROCESSES = "_nndist_over_processes"
"""The attribute of a module that marks a BatchNorm over all processes."""
_PLAIN = {kind: kind.forward for kind in (_BatchNorm, nn.SyncBatchNorm)}
_REPLACED: dict[type[nn.Module], Any] = {}


class Sums:
    """How the tensors of all processes are added: one way for all layers of a process, which are copied with networks.

    all_reduce: of the run's Runtime, in-place; on one machine's CPU through shared memory, as a layer needs four small
    sums a step. to_owner: while a step is checked (training/recheck.py), swaps each process's tensor for the one that
    another process computed from its share, so that the order of the additions, and so every bit, is that of the step.
    own_batch: during an evaluation, whose batches the processes have unequal numbers of, a layer in training mode takes
    the statistics of its own batch and keeps none; took_own: whether one did. leave_out: whether no row counts, as this
    process's batch is one example that must not (see data.MicroBatch). A network may make several rows of it: views,
    crops, frames.
    """

    all_reduce: Callable[[Tensor], Any] = dist.all_reduce
    to_owner: Callable[[Tensor], Tensor] | None = None
    own_batch = False
    took_own = False
    leave_out = False


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _summed(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _SumOverProcesses.apply(gradients[0])  # may be differentiated again, as for a gradient penalty


def _summed(tensor: Tensor) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format) if Sums.to_owner is None else Sums.to_owner(tensor)
    Sums.all_reduce(total)
    return total


def is_global(module: nn.Module) -> bool:
    """Whether the module is a BatchNorm over the examples of all processes, or the copy of one."""
    return getattr(module, OVER_PROCESSES, False)


def _normalised_alone(module: _BatchNorm, input: Tensor) -> Tensor:
    """The same over this process's batch, within an evaluation: running statistics would come to differ."""
    Sums.took_own = True
    if input.numel() == input.shape[1]:
        raise UserError(
            "score sets BatchNorm to training mode, and a process has a batch of 1 value per channel, with "
            "no deviation; give another --eval-batch-size, or leave BatchNorm in evaluation mode"
        )
    return F.batch_norm(input, None, None, module.weight, module.bias, True, 0.0, module.eps)


def _normalised(module: _BatchNorm, input: Tensor) -> Tensor:
    """The output of a BatchNorm in training, over the examples of all processes; updates its running statistics."""
    module._check_input_dim(input)
    if Sums.own_batch:
        return _normalised_alone(module, input)
    dims = [0, *range(2, input.dim())]
    shape = [1, -1] + [1] * (input.dim() - 2)
    values = input.to(torch.promote_types(input.dtype, torch.float32))
    counted = values[: 0 if Sums.leave_out else len(values)]  # always a slice: its gradients are added up first
    channels = values.shape[1]
    count = torch.full((1,), float(counted.numel() // channels), device=input.device)
    totals = _SumOverProcesses.apply(torch.cat([counted.sum(dims), count]))
    n = totals[-1].detach()
    if n.device.type == "cpu" and n == 1:
        raise ValueError("Expected more than 1 value per channel when training, got one in all processes")
    mean = totals[:-1] / n
    # a second pass for the deviations: the mean of squares minus the square of the mean loses digits in fp32
    variance = _SumOverProcesses.apply((counted - mean.view(shape)).square().sum(dims)) / n
    if module.track_running_stats:
        factor = module.momentum or 0.0
        if module.num_batches_tracked is not None:
            module.num_batches_tracked += 1
            factor = module.momentum if module.momentum is not None else 1.0 / float(module.num_batches_tracked)
        with torch.no_grad():  # either may have been set to None since
            if module.running_mean is not None:
                module.running_mean.lerp_(mean, factor)
            if module.running_var is not None:
                module.running_var.lerp_(variance * n / (n - 1).clamp_min(1), factor)
    output = (values - mean.view(shape)) * torch.rsqrt(variance + module.eps).view(shape)
    if module.affine:
        output = output * module.weight.view(shape) + module.bias.view(shape)
    return output.to(input.dtype)


def keep_out_of_graphs() -> None:
    """Lets torch.compile leave these layers' sums over the processes as they are, between two graphs."""
    global _normalised
    if not hasattr(_normalised, "__wrapped__"):
        _normalised = torch.compiler.disable(_normalised)


def _replace_forward(kind: type[_BatchNorm]) -> None:
    """Makes torch's forward pass of a class heed OVER_PROCESSES, unless other code has put its own in the place."""
    plain = _PLAIN[kind]
    if kind in _REPLACED or kind.forward is not plain:
        return

    # wraps: torch.jit.script reads the plain one, and looks up its names, F and Tensor, in this module
    @functools.wraps(plain)
    def forward(self: _BatchNorm, input: Tensor) -> Tensor:
        if self.training and is_global(self) and dist.is_initialized():
            return _normalised(self, input)
        return plain(self, input)

    kind.forward = _REPLACED[kind] = forward  # type: ignore[method-assign]


def with_global_batch_norm(network: nn.Module, all_reduce: Callable[[Tensor], Any], *, on_cpu: bool) -> None:
    """Makes every BatchNorm with torch's forward pass in the network take its statistics over all processes.

    Each stays the same object of the same class, so that hooks, references, its name and `type(module) is
    nn.BatchNorm2d` hold: torch's own classes get a forward pass that looks for a mark on the module, which its copies
    have too. A subclass with a forward pass of its own keeps it. SyncBatchNorm does the same on GPUs, and only there.
    """
    Sums.all_reduce = all_reduce
    for kind in _PLAIN:
        _replace_forward(kind)
    taken = [forward for kind, forward in _REPLACED.items() if on_cpu or kind is not nn.SyncBatchNorm]
    for module in network.modules():
        if isinstance(module, _BatchNorm) and type(module).forward in taken and "forward" not in vars(module):
            setattr(module, OVER_PROCESSES, True)
