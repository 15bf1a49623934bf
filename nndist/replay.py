"""What the engines share that replay steps instead of running the recipe's Python each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .data import GlobalBatch
from .errors import UserError
from .step import EagerStep


class ReplayingStep(EagerStep):
    """Goes back to eager steps where a recipe can't be replayed, and does without DDP.

    Several processes average their gradients with one collective per network and step: DDP's buckets and hooks take
    longer than a small network's backward pass, and no replay can hold them.
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.num_compared = 0
        self._eager_from_now_on = False
        self._agreed: set[str] = set()  # networks of which all processes have the same gradients
        modules = [module for network in self.networks.values() for module in network.modules()]
        self._watched = [self.recipe, *modules]
        if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in modules):
            self._give_up("the network has hooks")

    def _give_up(self, reason: str) -> None:
        """From now on steps are run eagerly; says why."""
        self._eager_from_now_on = True
        self.note = f"steps run eagerly ({reason})"
        self.say(f"engine   {self.note}")

    def _wrap(self, network: nn.Module) -> nn.Module:
        if self.runtime.world_size > 1:
            with torch.no_grad():
                for tensor in (*network.parameters(), *network.buffers()):
                    self.runtime.broadcast(tensor)  # as DDP does: another machine may have drawn others
        return self.runtime.wrap(network, ddp=False)

    def rehearse(self, give_batch: Callable[[], GlobalBatch]) -> None:
        """Nothing: gradients are summed in one order, from the first step on."""

    def _flat_gradients(self, name: str) -> Tensor:
        """All gradients of a network, one after another; raises UserError where the processes have not the same."""
        found = self._found(name)
        if name not in self._agreed:
            self._agreed.add(name)
            used = [parameter.grad is not None for parameter in self.parameters[name]]
            everyone = self.runtime.gather_objects(used)
            if any(theirs != used for theirs in everyone):
                raise UserError(
                    f"--engine {self.name}: of {name!r} the processes have gradients of {[*map(sum, everyone)]} "
                    "parameters, which must be the same ones; use --engine eager"
                )
        flat = torch.cat([gradient.flatten() for gradient in found])
        return flat.to(torch.bfloat16) if self.runtime.gradient_compression == "bf16" else flat

    def _spread(self, name: str, total: Tensor) -> None:
        """Makes the gradients what their sum over the processes says."""
        found = self._found(name)
        parts = total.div_(self.runtime.world_size).split([gradient.numel() for gradient in found])
        torch._foreach_copy_(found, [part.view(g.shape) for part, g in zip(parts, found, strict=True)])

    def _found(self, name: str) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters[name] if parameter.grad is not None]
