"""The repeated blocks of a network, the units of activation checkpointing and sharding; and sharded tensors."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The outermost children of a ModuleList or Sequential that share their class with a sibling and have parameters.

    Those that share a parameter with the rest of the network, such as tied weights, are left out.
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
    """Makes the backward pass recompute the inside of each repeated block; returns the number of blocks.

    Only a block's inputs are kept. The random state is restored for it, so dropout drops the same. Raises UserError if
    a block holds BatchNorm: its running statistics would count every batch twice.
    """
    blocks = [block for block in repeated_blocks(network) if any(True for _ in block.children())]
    for block in blocks:
        if any(isinstance(module, _BatchNorm) for module in block.modules()):
            raise UserError(
                f"--checkpoint-activations: {type(block).__name__} holds BatchNorm, whose running statistics would "
                "count every batch twice; leave the flag out"
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
    """This process's shard of a sharded tensor, in the same memory; any other as it is."""
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor  # importing DTensor takes 1 s


def sharded_as(like: Any, part: Tensor) -> Tensor:
    """This process's shard as a tensor of the shape of `like`, sharded as that is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def whole_tensor(tensor: Any) -> Tensor:
    """The full tensor of a sharded one, by a collective; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def is_sharded(network: nn.Module) -> bool:
    """Whether the network's parameters are sharded: then all processes must run it together."""
    return any(hasattr(parameter, "to_local") for parameter in network.parameters())
