"""Digits found on cluttered canvases, with boxes around them: object detection
by a convolutional network (CNN) (document 002, section 4).

    accelerate launch launch/train.py recipes/digits_detector.py

Measured: AP 0.556 (0.550 to 0.558), AP50 0.894 (0.884 to 0.895), 6.4 s;
connected pixels ap 0.226, ap50 0.307 (medians and ranges of 3 seeds,
2026-11-30, two threads of a 2-core AMD EPYC; 1,000 test canvases).

Canvases hold up to three real digits of MNIST and pieces of others; AP is
COCO's; the baseline takes connected bright pixels for the likest mean digit.

Differences from the document, which only names object detection: digits are
points of a map, as in CenterNet (Zhou et al. 2019, "Objects as points").
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from nndist import Answers, Batch, Count, History, Inputs, Networks, Recipe, ScheduleName, Total
from nndist.data import Data, DataConfig
from nndist.datasets.canvas_baselines import found_components, mean_digits
from nndist.datasets.canvases import as_floats, load_canvases
from nndist.figures.detections import boxed, coco_scores, judged, named

STRIDE = 4  # pixels of a canvas to a point of the map
FOUND = 10  # the most confident detections of a canvas, which are judged
SHOWN, SURE = 12, 0.4  # canvases of the picture; least confidence of its boxes and of the answers


def make_network(width: int) -> nn.Module:
    def layer(channels: int, to: int, stride: int = 1) -> tuple[nn.Module, ...]:
        return nn.Conv2d(channels, to, 3, stride, padding=1, bias=False), nn.BatchNorm2d(to), nn.ReLU()

    network = nn.Sequential(  # [k, 1, 48, 48], brightness from 0 to 1
        *layer(1, width, 2),  # [k, width, 24, 24]
        *layer(width, 2 * width, 2),  # [k, 2 * width, 12, 12]
        *(*layer(2 * width, 4 * width), *layer(4 * width, 4 * width), *layer(4 * width, 4 * width)),
        nn.Conv2d(4 * width, 14, 1),  # [k, 14, 12, 12]: logits of 10 classes, then how far a box reaches
    )
    nn.init.constant_(dict(network[-1].named_parameters())["bias"][:10], -3.0)  # most points are no digit's
    return network


@dataclass(kw_only=True)
class DigitsDetector(Recipe):
    """Boxes around digits."""

    document = "002, section 4"
    channels_last = True
    headline = ("test/ap", "test/ap50", "baseline")

    epochs: int = 3
    batch_size: int = 32
    lr: float = 3e-3
    schedule: ScheduleName = "cosine"
    width: Count = 16
    """Channels at 24x24 pixels; twice and four times as many at 12x12."""
    num_train: Count = 5000
    """Canvases to train on."""
    num_test: Count = 1000
    """Canvases to test on, of other digits."""
    data_seed: int = 0
    """Seed of the canvases."""

    def data(self, config: DataConfig) -> Data:
        train, test, digits = load_canvases(config, self.num_train, self.num_test, self.data_seed)
        self.means = mean_digits(digits)  # of the baseline
        sets, source = (train.with_boxes(), test.with_boxes()), f"canvases of {digits.source}"
        return Data(*sets, source, as_floats, classes=digits.classes, note=digits.note)

    def networks(self) -> dict[str, nn.Module]:
        return {"model": make_network(self.width)}

    def optimizer(self, name: str, network: nn.Module) -> optim.Optimizer:
        return optim.Adam(network.parameters(), lr=self.lr, fused=True)

    def loss(self, networks: Networks, batch: Batch) -> Tensor:
        """CenterNet's focal loss of the points, per digit, and a tenth of the boxes' absolute error in pixels, [k]."""
        images, boxes, labels, _ = batch
        logits, there = networks["model"](images), (labels >= 0).float()
        heat, cells, centres = targets(boxes, labels, logits.shape[2])
        sure = logits[:, :10].sigmoid()
        missed, elsewhere = (1 - sure) ** 2 * F.softplus(-logits[:, :10]), sure**2 * F.softplus(logits[:, :10])
        points = torch.where(heat == 1, missed, (1 - heat) ** 4 * elsewhere).sum((1, 2, 3))
        reach = logits[:, 10:].flatten(2).gather(2, cells.unsqueeze(1).expand(-1, 4, -1)).transpose(1, 2)
        off = (centres.repeat(1, 1, 2) + STRIDE * reach - boxes).abs().sum(2)
        return (points + 0.1 * (off * there).sum(1)) / there.sum(1)

    def score(self, networks: Networks, batch: Batch) -> Mapping[str, Tensor | Total]:
        """The loss; what is found on each canvas, in its own rows, and the number of digits of each class."""
        images, true_boxes, true_labels, numbers = batch
        rows = torch.zeros(max(self.num_train, self.num_test), FOUND, 12, device=images.device)
        true = torch.bincount(true_labels[true_labels >= 0], minlength=10)
        rows[numbers] = judged(*found(networks["model"](images)), true_boxes, true_labels)
        return {"loss": self.loss(networks, batch), "found": Total(rows), "true": Total(true)}

    def set_scores(self, means: Mapping[str, float], totals: Mapping[str, Tensor]) -> Mapping[str, float]:
        return coco_scores(totals["found"].flatten(0, 1), totals["true"])

    def preview(self, data: Data) -> dict[str, Any]:
        images, boxes, labels, _ = data.inputs(data.train, 0, SHOWN)
        truth = named(boxes, labels, (labels >= 0).float(), data.classes, 1.0)
        title = f"{self.name} on {data.source}: the first training images"
        return {"training_images": boxed(images[:, 0], 0 * boxes, truth, title)}

    def figures(self, networks: Networks, data: Data, history: History) -> dict[str, Any]:
        images, boxes, labels, _ = (tensor.cpu() for tensor in data.inputs(data.test))
        by_pixels = judged(*found_components(images[:, 0], self.means.cpu()), boxes, labels)
        scores = coco_scores(by_pixels.flatten(0, 1), torch.bincount(labels[labels >= 0], minlength=10))
        said = named(*found(networks["model"](data.inputs(data.test, 0, SHOWN)[0])), data.classes, SURE)
        title = f"{self.name} on {data.source}: what is found on test canvases; dashed is the truth"
        text = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        return {"boxes": boxed(images[:SHOWN, 0], boxes, said, title), "baseline": f"connected pixels: {text}"}

    def predict(self, networks: Networks, inputs: Inputs) -> Answers:
        """The digits of each canvas, the surest first; for programs also left, top, right and bottom in pixels."""
        rows = named(*found(networks["model"](inputs.batch()[0])), inputs.classes, SURE)
        details = [{"boxes": [{"digit": text.split()[0], "box": box} for box, text in row]} for row in rows]
        return Answers({"digits": [", ".join(text for _, text in row) or "none" for row in rows]}, details)


def found(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The FOUND most confident peaks of each map: boxes [k, FOUND, 4], classes and confidences [k, FOUND]."""
    heat, side = logits[:, :10].float().sigmoid(), logits.shape[2]
    sure, places = (heat * (heat == F.max_pool2d(heat, 3, 1, 1))).flatten(1).topk(FOUND)
    cells = places % side**2
    reach = logits[:, 10:].float().flatten(2).gather(2, cells.unsqueeze(1).expand(-1, 4, -1)).transpose(1, 2)
    return points_of(cells, side).repeat(1, 1, 2) + STRIDE * reach, places // side**2, sure


def points_of(cells: Tensor, side: int) -> Tensor:
    """Centres in pixels, across and down, [..., 2], of the map's cells, counted by rows."""
    return STRIDE * (torch.stack([cells % side, cells // side], -1) + 0.5)


def targets(boxes: Tensor, labels: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """The map to learn, 1 at each digit's cell and less around it, [k, 10, side, side]; the cells and their centres."""
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2
    column, row = (middle / STRIDE).long().clamp(0, side - 1).unbind(2)
    centres = points_of(cells := side * row + column, side)  # [k, m, 2]
    far = points_of(torch.arange(side**2, device=boxes.device), side) - centres.unsqueeze(2)  # [k, m, cells, 2]
    wide = ((boxes[..., 2:] - boxes[..., :2]).mean(2) / 6).clamp_min(1).unsqueeze(2)
    bumps = (-far.square().sum(3) / (2 * wide**2)).exp().unsqueeze(2) * F.one_hot(labels + 1, 11)[..., 1:].unsqueeze(3)
    return bumps.amax(1).unflatten(2, (side, side)), cells, centres
