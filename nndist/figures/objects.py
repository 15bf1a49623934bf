"""Objects in images: their pixels painted by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .plots import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = torch.tensor(  # of classes 0 to 9, and so on from the first: matplotlib's C0 to C9
    [
        *([31, 119, 180], [255, 127, 14], [44, 160, 44], [214, 39, 40], [148, 103, 189]),
        *([140, 86, 75], [227, 119, 194], [127, 127, 127], [188, 189, 34], [23, 190, 207]),
    ]
)


def painted(images: Tensor, masks: Tensor) -> Tensor:
    """Images, brightness from 0 to 1, with the pixels of each class in its colour: [k, h, w, 3] from 0 to 1.

    images: float [k, h, w], shown at a third of their brightness. masks: int64 [k, h, w], 0 where there is no object,
    else 1 + class.
    """
    colours = COLOURS.to(masks.device)[(masks - 1) % len(COLOURS)] / 255
    return torch.where((masks > 0).unsqueeze(3), colours, images.clamp(0, 1).unsqueeze(3) / 3)


def with_legend(figure: Figure, classes: Sequence[str]) -> Figure:
    """A figure of one pair of axes with the colours of the classes below it."""
    from matplotlib.patches import Patch

    patches = [Patch(color=f"C{number % 10}", label=name) for number, name in enumerate(classes)]
    figure.axes[0].legend(handles=patches, ncol=10, loc="upper center", bbox_to_anchor=(0.5, 0.0), frameon=False)
    figure.set_figheight(figure.get_figheight() + 0.4)
    return figure


def iou_by_class(counts: Mapping[str, Tensor], classes: Sequence[str]) -> Table:
    """Intersection over union of each class in percent, a column for each network, from its `overlaps` of a set."""
    shares = [(100 * common / either.clamp_min(1)).round(decimals=2).tolist() for common, either in counts.values()]
    return Table(("class", *(f"{name}, %" for name in counts)), list(zip(classes, *shares, strict=True)))
