"""Steps whose gradients are averaged while the backward pass still runs: by DDP, or block by block where sharded."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data.feed import GlobalBatch
from ..distributed.blocks import local, whole_tensor
from ..errors import ShortOfMemory, UserError
from ..metrics import Weighted
from ..recipe.contract import Networks
from ..runs.optimizer_state import repeatable
from .step import Prepared, Step


class DDPStep(Step):
    """Averages the gradients by torch's DistributedDataParallel, while the backward pass is still running.

    For networks whose gradients take long to send. It needs every parameter in every step, and calls of the network
    itself, not of its parts: so it is the choice of whoever starts the run.
    """

    def __init__(self, *arguments: Any):
        self._averaged: dict[str, set[int]] = {}
        super().__init__(*arguments)

    def _wrap(self, network: nn.Module) -> nn.Module:
        return self.runtime.wrap(network)

    @property
    def _scale(self) -> float:  # type: ignore[override]
        return float(self.runtime.world_size)  # DDP averages over the processes

    def _networks(self, name: str) -> Networks:
        return {**self.networks, name: self.wrapped[name]}

    def _gradients(self, name: str, batch: GlobalBatch, prepared: Prepared, *, final: bool) -> list[Tensor | Weighted]:
        self.gradient_sync[name].trusted = True  # DDP has done it
        now = {id(parameter) for parameter in self._parameters(name)}
        if self._averaged.setdefault(name, now) != now:
            raise UserError(
                f"--gradient-sync ddp: parameters of {name!r} were frozen or unfrozen after the start, and DDP would "
                "not average them; use --gradient-sync step"
            )
        return super()._gradients(name, batch, prepared, final=final)

    def _check_others_can_be_told(self, short: str) -> None:
        if self.runtime.world_size > 1:
            raise ShortOfMemory(short, True, self.runtime.rank)

    def _synchronised(self, name: str, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are averaged over the processes with the last micro-batch only."""
        wrapped = self.wrapped[name]
        if last or not isinstance(wrapped, DistributedDataParallel):
            return contextlib.nullcontext()
        return wrapped.no_sync()

    def warm_up(self, give_batch: Callable[[], GlobalBatch]) -> None:
        """Takes the passes over some whole batch before the first step; every effect on tensors is undone.

        DDP lays its gradient buckets out anew after the first backward pass, and so sums in another order from then
        on: with three or more processes a run that is resumed would differ in bits from one that was not interrupted.
        """
        if self.runtime.world_size == 1:
            return
        batch = give_batch()
        undo = repeatable(self.networks, self.runtime.device)
        micro = batch.micro_batches[0]
        for name in self.objectives:
            self._forward_backward(name, self.inputs(batch, micro), micro, batch.size)
            unused = [n for n, p in self.networks[name].named_parameters() if p.requires_grad and p.grad is None]
            if unused:
                raise UserError(
                    f"--gradient-sync ddp: {name}.{unused[0]} gets no gradient, and DDP waits for every parameter; "
                    "use --gradient-sync step"
                )
            for network in self.networks.values():
                for parameter in network.parameters():
                    parameter.grad = None
        undo()


class ShardedStep(Step):
    """The step over networks that are sharded over the processes (see sharding.FullyShard).

    Gradients are summed and split block by block within the backward pass, of every micro-batch: to keep those of a
    whole network until the last one would take the memory that splitting saves.
    """

    def _wrap(self, network: nn.Module) -> nn.Module:
        # A block that gives views, as attention's keys are, is warned about: adding to one in place would go wrong
        warnings.filterwarnings("ignore", message=".*returned a view tensor")
        return self.runtime.wrap(network, ddp=False)

    @property
    def _scale(self) -> float:  # type: ignore[override]
        return float(self.runtime.world_size)  # it averages over the processes

    def _gradients(self, name: str, batch: GlobalBatch, prepared: Prepared, *, final: bool) -> list[Tensor | Weighted]:
        self.gradient_sync[name].trusted = True
        losses = super()._gradients(name, batch, prepared, final=final)
        own = {id(parameter) for parameter in self.networks[name].parameters()}
        for parameter in (p for network in self.networks.values() for p in network.parameters()):
            if id(parameter) not in own:
                parameter.grad = None
        return losses

    def _parameters(self, name: str) -> list[nn.Parameter]:
        return []  # of all, since those that are gathered for a pass are other tensors

    def _check_others_can_be_told(self, short: str) -> None:
        raise ShortOfMemory(short, True, self.runtime.rank)

    def _clip(self, parameters: list[nn.Parameter], clip_norm: float) -> Tensor:
        found = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = whole_tensor(nn.utils.get_total_norm(found))
        factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        torch._foreach_mul_([local(gradient) for gradient in found], factor)
        return norm
