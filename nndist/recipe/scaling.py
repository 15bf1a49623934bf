"""Standardise inputs and targets of any unit for a network (mean 0, standard deviation 1), and scale its outputs back.

    def data(self, config):
        x, y = ...                                                    # [1000, 8] and [1000, 1], as they were measured
        self.x_scaling, self.y_scaling = Scaling.fit(x[:800]), Scaling.fit(y[:800])           # of the training part
        return Data(train=Resident(x[:800], y[:800]), test=Resident(x[800:], y[800:]))

    def networks(self):
        network = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
        return {"model": Scaled(network, inputs=self.x_scaling, outputs=self.y_scaling)}

    def loss(self, networks, batch):
        x, y = batch
        return self.y_scaling.difference(networks["model"](x), y).square().squeeze(1)           # of deviation 1

    def score(self, networks, batch):
        x, y = batch
        return {"error": (networks["model"](x) - y).abs().squeeze(1)}                           # in the unit of y

The network takes and returns values in measured units wherever it is used: in scores, predictions and exported files,
without the data. Means and deviations are buffers of the network, so each checkpoint has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError


class Scaling:
    """Subtracts a mean and divides by a standard deviation, and back.

    mean, std: float32 on the CPU, of a shape that broadcasts with a batch, such as [columns].
    """

    def __init__(self, mean: Tensor, std: Tensor):
        self.mean, self.std = mean, std
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __repr__(self) -> str:
        return f"Scaling(mean={self.mean.tolist()}, std={self.std.tolist()})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scaling) and self.mean.equal(other.mean) and self.std.equal(other.std)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def fit(cls, values: Tensor, dim: int | Sequence[int] = 0) -> Scaling:
        """The scaling by mean and deviation of values, [examples, ...] of any dtype; give it the training part only.

        dim: dimensions to average over. The default, the examples, yields a mean per column. For sequences [n, time,
        features] (0, 1) yields one per feature, for images [n, 3, h, w] (0, 2, 3) one per colour. A constant column
        gets deviation 1. Raises UserError for non-finite values.
        """
        dims = sorted({place % values.dim() for place in ((dim,) if isinstance(dim, int) else dim)})
        if 0 not in dims:
            raise ValueError(f"dim={dim}: must include 0, the examples")
        exact = values.detach().cpu().double()
        if not len(exact) or not exact.isfinite().all():
            bad = (~exact.isfinite()).nonzero()
            where = f"at {bad[0].tolist()}" if len(bad) else "in no examples"
            raise UserError(
                f"Scaling.fit: there is no finite number {where} of values of shape {list(values.shape)}; fill in or "
                "drop missing values"
            )
        mean = exact.mean(dims, keepdim=True)
        std = exact.var(dims, correction=0, keepdim=True).sqrt()
        # the rounding error of a constant column is not a deviation
        std = torch.where(std > 1e-12 * mean.abs().clamp_min(1e-30), std, torch.ones_like(std))
        return cls(mean[0].float(), std[0].float())

    def scale(self, values: Tensor) -> Tensor:
        """Measured values, standardised; float32."""
        mean, std = self._numbers(values.device)
        return (values.float() - mean) / std

    def unscale(self, values: Tensor) -> Tensor:
        """Standardised values, in measured units; float32."""
        mean, std = self._numbers(values.device)
        return values.float() * std + mean

    def difference(self, first: Tensor, second: Tensor) -> Tensor:
        """first - second of measured values, in standard deviations, as a loss needs it."""
        _, std = self._numbers(first.device)
        return (first.float() - second.float()) / std

    def _numbers(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and deviation on a device, copied once: a copy in each step would hold up a GPU."""
        if device not in self._on:
            self._on[device] = (self.mean.to(device), self.std.to(device))
        return self._on[device]


class Scaled(nn.Module):
    """A network that takes and returns values in measured units, and computes with standardised ones.

    inputs: scaling of the first argument, outputs: of the network's output, a tensor; None for no scaling. Means and
    deviations become buffers, so that checkpoints and exported files have them.
    """

    inputs_mean: Tensor | None
    inputs_std: Tensor | None
    outputs_mean: Tensor | None
    outputs_std: Tensor | None

    def __init__(self, network: nn.Module, inputs: Scaling | None = None, outputs: Scaling | None = None):
        super().__init__()
        self.network = network
        for name, scaling in (("inputs", inputs), ("outputs", outputs)):
            self.register_buffer(f"{name}_mean", None if scaling is None else scaling.mean.clone())
            self.register_buffer(f"{name}_std", None if scaling is None else scaling.std.clone())

    def forward(self, inputs: Tensor, *others: Any) -> Any:
        """The network's output in measured units, float32 if it is scaled."""
        if self.inputs_mean is not None and self.inputs_std is not None:
            inputs = (inputs.float() - self.inputs_mean) / self.inputs_std
        outputs = self.network(inputs, *others)
        if self.outputs_mean is not None and self.outputs_std is not None:
            outputs = outputs.float() * self.outputs_std + self.outputs_mean
        return outputs
