"""BatchNorm with the statistics of the global batch, however many processes share it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Sums:
    """How the tensors of all processes are added: one way for all layers of a process, which are copied with networks.

    all_reduce: of the run's Runtime, in-place; on one machine's CPU through shared memory, as a layer needs four small
    sums a step. to_owner: while a step is checked (training/recheck.py), swaps each process's tensor for the one that
    another process computed from its share, so that the order of the additions, and so every bit, is that of the step.
    leave_out: whether no row counts, as this process's batch is one example that must not (see data.MicroBatch). A
    network may make several rows of it: views, crops, frames.
    """

    all_reduce: Callable[[Tensor], Any] = dist.all_reduce
    to_owner: Callable[[Tensor], Tensor] | None = None
    leave_out: bool = False


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


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the examples of all processes, so that their number changes nothing.

    torch's SyncBatchNorm does the same, but on GPUs only.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        self._check_input_dim(input)
        dims = [0, *range(2, input.dim())]
        shape = [1, -1] + [1] * (input.dim() - 2)
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        counted = values[:0] if Sums.leave_out else values
        channels = values.shape[1]
        count = torch.full((1,), float(counted.numel() // channels), device=input.device)
        totals = _SumOverProcesses.apply(torch.cat([counted.sum(dims), count]))
        n = totals[-1].detach()
        if n.device.type == "cpu" and n == 1:
            raise ValueError("Expected more than 1 value per channel when training, got one in all processes")
        mean = totals[:-1] / n
        # a second pass for the deviations: the mean of squares minus the square of the mean loses digits in fp32
        variance = _SumOverProcesses.apply((counted - mean.view(shape)).square().sum(dims)) / n
        if self.track_running_stats:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            factor = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
            with torch.no_grad():
                self.running_mean.lerp_(mean, factor)  # type: ignore[union-attr]
                self.running_var.lerp_(variance * n / (n - 1).clamp_min(1), factor)  # type: ignore[union-attr]
        output = (values - mean.view(shape)) * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            output = output * self.weight.view(shape) + self.bias.view(shape)
        return output.to(input.dtype)


_GLOBAL: dict[type[nn.Module], type] = {
    kind: type(f"Global{kind.__name__}", (GlobalBatchNorm, kind), {}) for kind in BATCH_NORMS
}


def keep_out_of_graphs() -> None:
    """Lets torch.compile leave these layers' sums over the processes as they are, between two graphs."""
    if not hasattr(GlobalBatchNorm.forward, "__wrapped__"):
        GlobalBatchNorm.forward = torch.compiler.disable(GlobalBatchNorm.forward)  # type: ignore[method-assign]


def with_global_batch_norm(network: nn.Module, all_reduce: Callable[[Tensor], Any]) -> None:
    """Makes every BatchNorm of torch's own classes in the network take its statistics over all processes.

    The module stays the same object, so hooks, names and references to it hold. A custom subclass of BatchNorm keeps
    its own forward pass.
    """
    Sums.all_reduce = all_reduce
    for module in network.modules():
        if type(module) in _GLOBAL and "forward" not in vars(module):
            module.__class__ = _GLOBAL[type(module)]
