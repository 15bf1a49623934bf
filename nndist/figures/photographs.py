"""Figures of classified photographs: what augmentation does to them, scores by class, and what a network looks at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..data.sets import permutation
from .plots import Table, image_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..data.sets import Data

COLUMNS = 10
EPOCHS = 3


def augmentation(data: Data, name: str, seed: int = 0) -> Figure:
    """Some training images as they are, and below as three epochs see them, with the labels that count there."""
    numbers = permutation(len(data.train), seed, 0)[:COLUMNS]
    classes = [str(name) for name in data.classes]
    rows, titles = [], []
    for epoch in (None, *range(EPOCHS)):
        examples = data.train if epoch is None else data.train.in_epoch(seed, epoch)
        images, labels, *mixed = data.prepare(next(iter(examples.batches([numbers]))))
        rows.append(images.detach().float().cpu())
        others, shares = (part.tolist() for part in mixed) if mixed else (labels.tolist(), [1.0] * len(labels))
        for label, other, share in zip(labels.tolist(), others, shares, strict=True):
            parts = [(classes[label][:12], share), (classes[other][:12], 1 - share)]
            shown = [part for part in parts if part[1] > 0.005] if label != other else [(parts[0][0], 1.0)]
            titles.append("\n".join(f"{c} {s:.0%}" if s < 0.995 else c for c, s in shown))
    title = f"{name} on {data.source}: {len(numbers)} training images as they are, and as {EPOCHS} epochs see them"
    return image_grid(torch.cat(rows), titles, title)


def saliency(network: nn.Module, data: Data, name: str, listed: Table) -> dict[str, Any]:
    """Where a change would move the answer most, for the worst errors: each image beside its gradient's size.

    listed: the table "prediction_list" of `plots.classification`. The answer is the logit of the class that the network
    gives (Simonyan et al. 2014, https://arxiv.org/abs/1312.6034). Empty if there is no error.
    """
    rows = [row for row in listed.rows if row[1] != row[2]][:COLUMNS]
    if not rows:
        return {}
    images = data.prepare(next(iter(data.test.batches([torch.tensor([row[0] for row in rows])]))))[0]
    with torch.enable_grad():
        pixels = images.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network(pixels).max(1).values.sum(), pixels)
    size = nn.functional.avg_pool2d(gradient.abs().amax(1, keepdim=True), 3, 1, 1)  # [k, 1, h, w]
    low, high = (part(images, (1, 2, 3)) for part in (torch.amin, torch.amax))
    shown = (images - low.view(-1, 1, 1, 1)) / (high - low).clamp_min(1e-6).view(-1, 1, 1, 1)
    heat = size / size.amax((2, 3), keepdim=True).clamp_min(1e-12)
    beside = torch.cat([shown, shown.mean(1, keepdim=True) * (1 - heat) * torch.ones_like(shown)], 2)
    beside[:, 0, images.shape[2] :] = torch.maximum(beside[:, 0, images.shape[2] :], heat[:, 0])
    titles = [f"{row[2]}\nis {row[1]}" for row in rows]
    return {"saliency": image_grid(beside.detach(), titles, f"{name}: the worst errors, and what decides them")}
