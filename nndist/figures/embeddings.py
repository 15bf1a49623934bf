"""How good embeddings are: the verification curve of pairs, and the images that lie nearest to others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..metrics import equal_error_rate, verification_curve
from .generated_images import image_rows
from .plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def verification(similarities: Mapping[str, Tensor], same: Tensor, title: str) -> Figure:
    """The share of pairs of one class that are accepted against that of others (ROC), a curve for each similarity [n].

    same: 1 where a pair is of one class, else 0, [n].
    """
    figure = new_figure(6.4, 5.4)
    axes = figure.add_subplot()
    for name, similarity in similarities.items():
        false, true = (100 * rate for rate in verification_curve(similarity, same))
        axes.plot(false, true, label=f"{name}, equal error {equal_error_rate(similarity, same):.1%}")
    axes.plot([0, 100], [100, 0], color="0.6", linewidth=0.8, linestyle=":", label="equal errors")
    axes.set_xlabel("pairs of different classes accepted, %")
    axes.set_ylabel("pairs of one class accepted, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    axes.set_title(title, fontsize=10)
    return figure


def neighbours(
    ink: Tensor, labels: Tensor, embeddings: Tensor, title: str, *, queries: int = 12, nearest: int = 5
) -> Figure:
    """The first images, [n, h, w] from 0 to 1, above those most like them by the cosine of their embeddings [n, size].

    Images of another class than the first row's are red.
    """
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    likeness = unit[:queries] @ unit.T
    likeness.fill_diagonal_(-2.0)
    found = likeness.topk(nearest).indices  # [queries, nearest]
    rows = {"image": 1 - ink[:queries].unsqueeze(3).expand(-1, -1, -1, 3)}
    red = torch.tensor([0.0, 1.0, 1.0], device=ink.device)  # what ink takes away of the paper's colours
    for place, numbers in enumerate(found.T, 1):
        wrong = (labels[numbers] != labels[:queries]).view(-1, 1, 1, 1)
        rows[f"nearest {place}"] = 1 - ink[numbers].unsqueeze(3) * torch.where(wrong, red, 1.0)
    return image_rows(rows, title)
