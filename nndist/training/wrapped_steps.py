"""Steps whose gradients are averaged during the backward pass: by DDP, or block by block if sharded."""

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
from ..errors import ShortOfMemory, UserError, first_line
from ..metrics import Weighted
from ..recipe.contract import Networks
from ..runs.random_state import repeatable
from .step import Prepared, Step
from .whole_steps import WHOLE_MATRICES, whole_step


class DDPStep(Step):
    """Averages the gradients with torch's DistributedDataParallel (DDP) during the backward pass.

    For networks whose gradients take long to send. It needs every parameter in every step, and calls of the network
    itself, not of its parts: so it has to be requested.
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
        return self.networks if self.recheck.is_redoing else {**self.networks, name: self.wrapped[name]}

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
        """Averages gradients over the processes with the last micro-batch only."""
        wrapped = self.wrapped[name]
        if last or not isinstance(wrapped, DistributedDataParallel):
            return contextlib.nullcontext()
        return wrapped.no_sync()

    def warm_up(self, give_batch: Callable[[], GlobalBatch]) -> None:
        """Runs the passes over one micro-batch before the first step and undoes every effect on tensors.

        DDP rebuilds its gradient buckets after the first backward pass, and so sums in a different order from then on:
        with three or more processes a resumed run would differ in bits from an uninterrupted one.
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
    """The step for sharded networks (see sharding.FullyShard).

    Gradients are reduced and sharded block by block in the backward pass of every micro-batch: keeping full ones until
    the last would take the memory that sharding saves.
    """

    def _wrap(self, network: nn.Module) -> nn.Module:
        # FSDP warns of a block that returns views, as attention's keys are: an in-place change of one would be wrong
        warnings.filterwarnings("ignore", message=".*returned a view tensor")
        return self.runtime.wrap(network, ddp=False)

    @property
    def _scale(self) -> float:  # type: ignore[override]
        return float(self.runtime.world_size)  # FSDP averages over the processes

    def _gradients(self, name: str, batch: GlobalBatch, prepared: Prepared, *, final: bool) -> list[Tensor | Weighted]:
        self.gradient_sync[name].trusted = True
        losses = super()._gradients(name, batch, prepared, final=final)
        own = {id(parameter) for parameter in self.networks[name].parameters()}
        for parameter in (p for network in self.networks.values() for p in network.parameters()):
            if id(parameter) not in own:
                parameter.grad = None
        return losses

    def _update(self, name: str) -> None:
        if isinstance(self.optimizers[name], WHOLE_MATRICES):
            whole_step(self.optimizers[name])
            self._clear(name)  # what is left of the step, without gradients, are its hooks and counters
        try:
            super()._update(name)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            if not any(text in str(error) for text in ("DTensor", "placement", "sharding")):
                raise
            kind = type(self.optimizers[name]).__name__
            raise UserError(
                f"--shard fsdp: the step of {kind}, the optimizer of {name!r}, uses what torch can't do on sharded "
                f"parameters ({first_line(error)[:150]}); use one that updates each element by itself, such as AdamW, "
                "or leave --shard out"
            ) from error

    def _parameters(self, name: str) -> list[nn.Parameter]:
        return []  # means all: those gathered for a pass are different tensors

    def _check_others_can_be_told(self, short: str) -> None:
        raise ShortOfMemory(short, True, self.runtime.rank)

    def _clip(self, parameters: list[nn.Parameter], clip_norm: float) -> Tensor:
        found = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = whole_tensor(nn.utils.get_total_norm(found))
        factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        torch._foreach_mul_([local(gradient) for gradient in found], factor)
        return norm
