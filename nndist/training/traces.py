"""What a pass computed, as hashes in order: the outputs of modules, the losses, the gradients of parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Batch, tensors_of
from ..metrics import Weighted
from ..runs.fingerprints import combined, fingerprint

Event = tuple[str, int]
"""Such as ("the output of model.conv1", its hash)."""


class Trace:
    """Hashes of what a pass computes, in order. Nothing waits for the device before `events`."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._hashes: list[Tensor] = []

    def add(self, name: str, tensors: list[Tensor]) -> None:
        """Notes a result."""
        if tensors:
            self._names.append(name)
            self._hashes.append(combined(map(fingerprint, tensors)) if len(tensors) > 1 else fingerprint(tensors[0]))

    def add_losses(self, losses: Tensor | Weighted) -> None:
        """Notes the losses of a micro-batch."""
        self.add("the losses", [losses.values, losses.weights] if isinstance(losses, Weighted) else [losses])

    def events(self) -> list[Event]:
        """All results so far."""
        if not self._hashes:
            return []
        device = self._hashes[-1].device
        numbers = torch.stack([one.to(device) for one in self._hashes]).tolist()
        return list(zip(self._names, numbers, strict=True))

    @contextlib.contextmanager
    def noting(self, networks: Mapping[str, nn.Module], *, modules_too: bool) -> Iterator[None]:
        """Context manager: notes what the networks' modules give and the gradients that their parameters get."""
        handles: list[Any] = []
        for name, network in networks.items():
            for key, parameter in network.named_parameters():
                if parameter.requires_grad:
                    handles.append(parameter.register_hook(self._of_gradient(f"{name}.{key}")))
            for key, module in network.named_modules() if modules_too else ():
                is_inner = not isinstance(module, torch.jit.ScriptModule) and any(True for _ in module.children())
                if not is_inner:
                    full = f"{name}.{key}" if key else name
                    handles.append(module.register_forward_hook(self._of_module(full)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _of_gradient(self, name: str) -> Any:
        return lambda gradient: self.add(f"the gradient of {name}", [gradient])

    def _of_module(self, name: str) -> Any:
        return lambda module, given, output: self.add(f"the output of {name}", results_in(output))


def results_in(output: Batch) -> list[Tensor]:
    """The tensors in what a module returned."""
    return [tensor for tensor in tensors_of(output) if not tensor.is_meta]


def first_difference(ours: list[Event], theirs: list[Event]) -> int | None:
    """The place of the first event that differs; None if none does."""
    for place, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if tuple(one) != tuple(other):
            return place
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))
