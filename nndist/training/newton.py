"""Newton's method as an optimizer of torch, for networks of a few weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import optim


class Newton(optim.Optimizer):
    """Newton's method for a few weights. The Hessian is made of differences of gradients; its eigenvalues are taken
    without their signs, so that a step leads away from a saddle, and a step is at most `longest`."""

    def __init__(self, parameters: Any, lr: float = 1.0, longest: float = 1.5) -> None:
        super().__init__(parameters, {"lr": lr, "longest": longest})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        closure = torch.enable_grad()(closure)
        (group,) = self.param_groups
        (weights,) = group["params"]
        loss = closure()
        gradient, here, rows, small = weights.grad.clone(), weights.clone(), [], 1e-2
        for shift in small * torch.eye(len(weights), device=weights.device):
            for moved in (here - shift, here + shift):
                weights.copy_(moved)
                closure()
                rows.append(weights.grad.clone())
        weights.copy_(here)
        hessian = torch.stack(
            [(above - below) / (2 * small) for below, above in zip(rows[::2], rows[1::2], strict=True)]
        )
        values, vectors = torch.linalg.eigh((hessian + hessian.T) / 2)
        change = vectors @ ((vectors.T @ gradient) / values.abs().clamp_min(1e-4))
        weights -= group["lr"] * change * (group["longest"] / change.norm()).clamp_max(1.0)
        return loss
