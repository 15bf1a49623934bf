"""What an attention looks at: which symbols that are read belong to which that are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def alignments(weights: Tensor, read: Sequence[str], wrote: Sequence[str], title: str) -> Figure:
    """Up to six attentions, [k, written, read], each over its two texts' characters, three in a row."""
    figure = new_figure(13.0, 8.0 if len(read) > 3 else 4.4)
    panels = figure.subplots(2 if len(read) > 3 else 1, 3).flat
    for matrix, mine, other, axes in zip(weights.cpu().numpy(), read, wrote, panels, strict=False):
        image = axes.imshow(matrix[: len(other), : len(mine)], cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set(xticks=range(len(mine)), yticks=range(len(other)), xticklabels=list(mine), yticklabels=list(other))
    figure.colorbar(image, ax=figure.axes, label="share of the attention", fraction=0.03, aspect=50)
    figure.suptitle(f"{title}: attention, columns read, rows written", fontsize=11)
    return figure
