"""Exact means: sums and counts over every example once, reduced over the processes once per record."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


class Means:
    """Running means of named per-example figures.

    Sums are kept in float64 on the device, so that adding costs no synchronisation.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, values: Tensor, *, counted: bool = True) -> None:
        """Adds per-example figures, shape [k] or [k, ...]; `counted=False` only makes the name known."""
        values = values.detach()
        total = values.sum(dtype=torch.float64)
        if not counted:
            total, size = torch.zeros_like(total), 0
        else:
            size = values.numel()
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts.get(name, 0) + size

    def state(self) -> dict[str, tuple[float, int]]:
        """Name -> (sum, count) of this process, exact in JSON."""
        return {name: (self.sums[name].item(), self.counts[name]) for name in sorted(self.sums)}

    def merge(self, other: Means, *, counted: bool) -> None:
        """Adds another's sums and counts, or only learns its names."""
        for name, total in other.sums.items():
            total = total if counted else torch.zeros_like(total)
            self.sums[name] = self.sums[name] + total if name in self.sums else total
            self.counts[name] = self.counts.get(name, 0) + (other.counts[name] if counted else 0)

    @classmethod
    def from_state(cls, state: Mapping[str, Sequence[float]], device: torch.device) -> Means:
        """What `state` gave."""
        means = cls()
        for name, (total, count) in state.items():
            means.sums[name] = torch.tensor(total, dtype=torch.float64, device=device)
            means.counts[name] = int(count)
        return means

    def reduce(self, all_reduce_sum: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, tuple[float, int]]:
        """Name -> (mean, count) over all processes, in one collective. Every process must know the same names."""
        names = sorted(self.sums)
        if not names:
            return {}
        counts = torch.tensor([self.counts[name] for name in names], dtype=torch.float64, device=device)
        totals = all_reduce_sum(torch.cat([torch.stack([self.sums[name].to(device) for name in names]), counts]))
        values = totals.tolist()
        means: dict[str, tuple[float, int]] = {}
        for name, total, count in zip(names, values[: len(names)], values[len(names) :], strict=True):
            means[name] = (total / count if count else math.nan, round(count))
        return {name: means[name] for name in self.sums}  # in the order in which the recipe gave them
