"""The repeated blocks of a network: what is recomputed, and what is gathered from the processes, on its own."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The outermost children of a ModuleList or Sequential that are like another one: same class, with parameters.

    Those that share a parameter with the rest of the network, as tied weights do, are left out: they belong to it.
    """
    found: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> None:
        children = list(module.children())
        stacked = [child for child in children if any(True for _ in child.parameters())]
        counts = Counter(map(type, stacked)) if isinstance(module, nn.ModuleList | nn.Sequential) else Counter()
        for child in children:
            if counts[type(child)] > 1 and not isinstance(child, nn.ModuleList | nn.ModuleDict):  # these can't be run
                found[id(child)] = child
            else:
                visit(child)

    visit(network)
    inside = {id(module) for block in found.values() for module in block.modules()}
    owners = Counter(
        identity
        for block in found.values()
        for identity in {id(parameter) for parameter in block.parameters()}  # once for each block
    )
    owners.update(
        id(parameter)
        for module in network.modules()
        if id(module) not in inside
        for parameter in module.parameters(recurse=False)
    )
    return [block for block in found.values() if all(owners[id(parameter)] == 1 for parameter in block.parameters())]


def recompute_activations(network: nn.Module) -> int:
    """Has the backward pass compute the inside of each repeated block again instead of keeping it; gives their number.

    Kept is what goes into a block. Random numbers are put back for it, so dropout drops the same. Raises UserError
    where a block holds BatchNorm: its running statistics would take every batch in twice.
    """
    blocks = [block for block in repeated_blocks(network) if any(True for _ in block.children())]
    for block in blocks:
        if any(isinstance(module, _BatchNorm) for module in block.modules()):
            raise UserError(
                f"--checkpoint-activations: {type(block).__name__} holds BatchNorm, whose running statistics would "
                "take in every batch twice; leave the flag out"
            )
        block.forward = _recomputed(block)
    return len(blocks)


def _recomputed(block: nn.Module) -> Any:
    from torch.utils.checkpoint import checkpoint

    forward = block.forward

    def forward_again(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        return checkpoint(forward, *arguments, use_reentrant=False, **named)

    return forward_again


def local(tensor: Any) -> Tensor:
    """This process's part of a tensor that is split over the processes, in the same memory; any other as it is."""
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor  # an import of DTensor takes 1 s


def whole_tensor(tensor: Any) -> Tensor:
    """All of a tensor that is split over the processes, which all take part; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def is_split(network: nn.Module) -> bool:
    """Whether the network's parameters are split over the processes, which then run it together or not at all."""
    return any(hasattr(parameter, "to_local") for parameter in network.parameters())
