"""How good detected boxes are: average precision as COCO defines it, and boxes drawn.

Definition: https://cocodataset.org/#detection-eval, and the code of its package pycocotools.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""The least intersections over union (IoU) with a true box at which a detection is right; results are their mean."""
RECALLS = np.linspace(0.0, 1.0, 101)


Boxes = Sequence[tuple[Sequence[float], str]]
"""The boxes of one image, each with a text."""


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of each of [..., d, 4] with each of [..., m, 4]: [..., d, m]; 0 for empty boxes.

    Boxes are left, top, right, bottom.
    """
    boxes, others = boxes.unsqueeze(-2), others.unsqueeze(-3)
    sides = torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(boxes[..., :2], others[..., :2])
    common = sides.clamp_min(0).prod(-1)
    areas = [(of[..., 2:] - of[..., :2]).clamp_min(0).prod(-1) for of in (boxes, others)]
    return common / (areas[0] + areas[1] - common).clamp_min(1e-12)


def matches(boxes: Tensor, labels: Tensor, true_boxes: Tensor, true_labels: Tensor) -> Tensor:
    """Whether each detection is right at each of THRESHOLDS: bool [k, d, 10].

    boxes [k, d, 4] and labels [k, d]: those of k images, the most confident first. true_boxes [k, m, 4], true_labels
    [k, m], -1 where there is none. In their order each takes the free true box of its class that it overlaps most; a
    second one for the same true box is wrong.
    """
    overlap = box_iou(boxes.double(), true_boxes.double())  # [k, d, m]
    same = (labels.unsqueeze(2) == true_labels.unsqueeze(1)) & (true_labels >= 0).unsqueeze(1)
    overlap = torch.where(same, overlap, -1.0)
    least = torch.tensor(THRESHOLDS, device=boxes.device)
    free = torch.ones(len(boxes), len(least), true_boxes.shape[1], dtype=torch.bool, device=boxes.device)
    right = []
    for number in range(boxes.shape[1]):
        candidates = torch.where(free, overlap[:, None, number], -1.0)  # [k, 10, m]
        best, taken = candidates.max(2)
        right.append(best >= least)
        free &= ~(torch.nn.functional.one_hot(taken, free.shape[2]).bool() & right[-1].unsqueeze(2))
    return torch.stack(right, 1)


def judged(boxes: Tensor, labels: Tensor, scores: Tensor, true_boxes: Tensor, true_labels: Tensor) -> Tensor:
    """What `average_precision` needs of each detection of k images, the most confident first: float32 [k, d, 12].

    Its score, its class, and whether it is right at each of THRESHOLDS, as `matches` says.
    """
    right = matches(boxes, labels, true_boxes, true_labels)
    return torch.cat([scores.unsqueeze(2), labels.unsqueeze(2), right], 2).float()


def average_precision(rows: Tensor, true: Tensor) -> np.ndarray:
    """Average precision of a set at each of THRESHOLDS for each class, float64 [10, classes]; nan if a class is absent.

    rows: of all its detections, [n, 12], from `judged`; those of score 0 are none. true: the number of true boxes of
    each class, [classes].
    """
    values = rows[rows[:, 0] > 0].cpu().numpy()
    values = values[np.argsort(-values[:, 0], kind="mergesort")]
    found = np.full((len(THRESHOLDS), len(true)), np.nan)
    for number, count in enumerate(true.tolist()):
        if count:
            counted = np.cumsum(values[values[:, 1] == number, 2:], 0, dtype=np.float64)  # [detections, 10]
            for place, right in enumerate(counted.T):
                precision = right / np.arange(1, len(right) + 1)
                precision = np.maximum.accumulate(precision[::-1])[::-1]  # the best at this recall or a higher one
                at = np.searchsorted(right / count, RECALLS)
                found[place, number] = np.append(precision, 0.0)[at].mean()
    return found


def coco_scores(rows: Tensor, true: Tensor) -> dict[str, float]:
    """COCO's "ap", the mean over classes and THRESHOLDS, and "ap50", that at an IoU of 0.5; see `average_precision`."""
    found = average_precision(rows, true)
    return {"ap": float(np.nanmean(found)), "ap50": float(np.nanmean(found[0]))}


def named(boxes: Tensor, labels: Tensor, scores: Tensor, classes: Sequence[str], least: float) -> list[Boxes]:
    """The boxes of each image [k, d, 4] whose scores [k, d] are at least `least`, each with its class and score.

    A score of 1, the truth's, is not written.
    """
    return [
        [
            (box, classes[label] + f" {score:.0%}" * (score < 1))
            for box, label, score in zip(*(part.tolist() for part in image), strict=True)
            if score >= least
        ]
        for image in zip(boxes, labels, scores, strict=True)
    ]


def boxed(images: Tensor, truth: Tensor, said: Sequence[Boxes], title: str) -> Figure:
    """Images, brightness from 0 to 1, [k, h, w], with true boxes dashed and detected ones with their texts.

    truth: those of at least k images, [n, m, 4]; of empty ones nothing is drawn.
    """
    from matplotlib.patches import Rectangle

    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    figure = new_figure(2.0 * columns, 2.05 * rows + 0.4)
    for number, (image, true, found) in enumerate(zip(images.cpu(), truth[: len(images)], said, strict=True), 1):
        axes = figure.add_subplot(rows, columns, number)
        height, width = image.shape
        axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
        axes.set_axis_off()
        dashed = [(box, "") for box in true.tolist() if box[2] > box[0]]
        for boxes, style, colour in ((dashed, (0, (2, 2)), "white"), (found, "solid", "tab:orange")):
            for (left, top, right, bottom), text in boxes:
                sides = (right - left, bottom - top)
                box = Rectangle((left, top), *sides, fill=False, edgecolor=colour, linewidth=1.3, linestyle=style)
                axes.add_patch(box)
                if boxes is found:
                    paper = {"facecolor": "black", "alpha": 0.65, "linewidth": 0, "pad": 0.8}
                    said_here = axes.text(left, top, text, color=colour, fontsize=7.5, va="bottom", bbox=paper)
                    said_here.set_in_layout(False)
    figure.suptitle(title, fontsize=10)
    return figure
