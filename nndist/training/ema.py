"""The exponential moving average (EMA) of the networks' weights, if a run keeps one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..distributed.blocks import local
from ..runs.checkpoint import check_tensors, network_tensors
from ..runs.network_state import own_tensors


def average_of(networks: Mapping[str, nn.Module], decay: float | None) -> NoAverage:
    """The EMA with this decay, or none if it is None."""
    return NoAverage() if decay is None else MovingAverage(networks, decay)


class NoAverage:
    """Null object for a run without an EMA."""

    def update(self, step: int) -> None:
        """Does nothing."""

    def applied(self) -> contextlib.AbstractContextManager[None]:
        """Leaves the networks as they are."""
        return contextlib.nullcontext()

    def state(self) -> dict[str, dict[str, Tensor]] | None:
        """None: there is no EMA."""
        return None

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Does nothing."""

    def begin(self) -> None:
        """Does nothing."""


class MovingAverage(NoAverage):
    """EMA of the networks' parameters, with their latest buffers; sharded as they are.

    After every step: average = decay * average + (1 - decay) * parameter. The decay is at most
    (1 + step) / (10 + step), so that the initial weights are soon forgotten (as in TensorFlow).
    """

    def __init__(self, networks: Mapping[str, nn.Module], decay: float):
        self.networks = networks
        self.decay = decay
        self.average = {
            name: {key: value.detach().clone() for key, value in own_tensors(network).items()}
            for name, network in networks.items()
        }
        pairs = [
            (self.average[name][key], parameter)
            for name, network in networks.items()
            for key, parameter in network.named_parameters(remove_duplicate=False)  # tied weights have two names
        ]
        self._copied = [(a, p) for a, p in pairs if not (p.is_floating_point() or p.is_complex())]
        pairs = [(a, p) for a, p in pairs if p.is_floating_point() or p.is_complex()]
        self._averages: list[Tensor] = [local(average) for average, _ in pairs]
        self._parameters: list[Tensor] = [local(parameter) for _, parameter in pairs]

    @torch.no_grad()
    def begin(self) -> None:
        """Starts from the current weights."""
        torch._foreach_copy_(self._averages, self._parameters)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Adds the weights after optimizer step `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._parameters, 1 - decay)
        for average, parameter in self._copied:  # integers have no mean
            local(average).copy_(local(parameter))

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Context manager: the networks have the averaged parameters."""
        kept = [parameter.detach().clone() for parameter in self._parameters]
        self._refresh_buffers()
        torch._foreach_copy_(self._parameters, self._averages)
        try:
            yield
        finally:
            torch._foreach_copy_(self._parameters, kept)

    def state(self) -> dict[str, dict[str, Tensor]] | None:
        """Network name -> averaged parameters and latest buffers."""
        self._refresh_buffers()
        return self.average

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `checkpoint.network_tensors` made of `state`; raises DamagedCheckpoint if it does not fit."""
        own = network_tensors(self.average)
        check_tensors(own, tensors, "ema.safetensors")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def _refresh_buffers(self) -> None:
        for name, network in self.networks.items():
            for key, value in network.named_buffers():
                if key in self.average[name]:
                    self.average[name][key].copy_(value)
