"""Exact hashes of tensors, computed on their device from their bits as whole numbers, so that nothing is rounded.

The bits of element i, as a whole number, are multiplied by an odd number that depends on i, and added up modulo 2**64.
An odd factor is invertible there, so a single changed element, and so a single flipped bit, always changes the sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..distributed.blocks import is_sharded, local
from ..distributed.runtime import Runtime

NAME = "fingerprint"
"""What records call the hash of all weights."""
BLOCK = 1 << 16
"""Elements that are multiplied at once: their products fit in a processor's cache."""
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SPREAD = 0x9E3779B97F4A7C15 - (1 << 64)  # odd: 2**64 over the golden ratio, as a signed number
_factors: dict[torch.device, Tensor] = {}


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """A hash of a tensor's bits in the order of its elements, int64 [], on its device; of a sharded one's own part."""
    plain = local(tensor.detach())
    if plain.layout != torch.strided:
        plain = plain.coalesce()
        parts = [fingerprint(plain.indices()), fingerprint(plain.values())]
        return combined(parts)
    plain = torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain
    words = plain.contiguous().view(-1).view(_WORDS[plain.element_size()])
    count = len(words)
    if not count:
        return torch.zeros((), dtype=torch.int64, device=words.device)
    factors = _odd_numbers(words.device)
    if count <= BLOCK:
        return (words * factors[:count]).sum()
    whole = count // BLOCK
    sums = [(words[n * BLOCK : (n + 1) * BLOCK] * factors).sum() for n in range(whole)]
    rest = words[whole * BLOCK :]
    return combined([*sums, (rest * factors[: len(rest)]).sum()])


def combined(hashes: Iterable[Tensor]) -> Tensor:
    """One hash of several, in their order, int64 []."""
    together = torch.stack([*hashes])
    factors = _odd_numbers(together.device)
    if len(together) <= BLOCK:
        return (together * factors[: len(together)]).sum()
    return combined([combined(part) for part in together.split(BLOCK)])


def of_weights(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """A hash of each parameter of the networks by its full name, in order of definition."""
    return {
        f"{name}.{key}": fingerprint(parameter)
        for name, network in networks.items()
        for key, parameter in network.named_parameters()
    }


def of_run(networks: Mapping[str, nn.Module], runtime: Runtime) -> str:
    """A hash of all parameters, 16 hexadecimal digits; if sharded, a collective, and it depends on the sharding."""
    number = int(combined(of_weights(networks).values()))
    if any(map(is_sharded, networks.values())):
        number = int(combined(map(torch.tensor, runtime.gather_objects(number))))
    return readable(number)


def readable(number: int) -> str:
    """A hash as 16 hexadecimal digits."""
    return f"{number % (1 << 64):016x}"


def _odd_numbers(device: torch.device) -> Tensor:
    """The factors of a block's elements: odd, and far apart. int64 [BLOCK]."""
    if device not in _factors:
        _factors[device] = (torch.arange(BLOCK, dtype=torch.int64, device=device) * _SPREAD) | 1
    return _factors[device]
