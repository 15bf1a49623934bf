"""Digits on cluttered canvases cut out pixel by pixel by a U-Net: semantic
segmentation by a convolutional network (CNN) (document 002, section 4).

    accelerate launch launch/train.py recipes/digits_unet.py

Measured: mean IoU over 11 classes 0.467 (0.465 to 0.468), the best thresholds
0.082, 6.1 s (medians and ranges of 3 seeds, 2026-11-30, two threads of a 2-core
AMD EPYC; 1,000 test canvases).

Canvases hold up to three real digits of MNIST and pieces of others. IoU is
intersection over union of a class's pixels. Thresholds know the likeliest class
of each brightness: it is always paper, as digits and pieces are equally bright.

Differences from the document, which only names semantic segmentation: a small
U-Net (Ronneberger et al. 2015) that works on half the pixels to a side.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from nndist import Answers, Batch, Count, History, Inputs, Networks, Recipe, ScheduleName, Total
from nndist.data import Data, DataConfig, Resident
from nndist.datasets.canvases import as_floats, load_canvases
from nndist.figures import generated_images as quality
from nndist.figures.objects import iou_by_class, painted, with_legend
from nndist.metrics import overlaps

CLASSES = 11  # 0 is paper and clutter, then the digits
PAPER = 0.2  # weight of its pixels in the loss
SHOWN = 9  # columns of the picture


def block(channels: int, width: int, stride: int = 1) -> nn.Module:
    """A convolution; BatchNorm has its bias."""
    return nn.Sequential(nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


class UNet(nn.Module):
    """Down to maps of 24, 12 and 6 pixels and up again, each step up beside what was there on the way down."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.down = nn.ModuleList(block(c, w, 2) for c, w in zip((1, *widths), widths, strict=False))
        self.middle = block(4 * width, 4 * width)
        self.up = nn.ModuleList(block(3 * w, w) for w in widths[-2::-1])
        self.classify = nn.Sequential(nn.Conv2d(width, 4 * CLASSES, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:  # [k, 1, 48, 48], brightness from 0 to 1
        kept: list[Tensor] = []
        for layers in self.down:
            x = layers(x)
            kept.append(x)
        x = self.middle(x)
        for layers, beside in zip(self.up, kept[-2::-1], strict=True):
            x = layers(torch.cat([F.interpolate(x, scale_factor=2.0), beside], 1))
        return self.classify(x)  # [k, CLASSES, 48, 48]


@dataclass(kw_only=True)
class DigitsUNet(Recipe):
    """Pixels of digits, by their class."""

    document = "002, section 4"
    channels_last = True
    headline = ("test/miou/network", "test/miou/thresholds")

    epochs: int = 2
    batch_size: int = 16
    lr: float = 3e-3
    schedule: ScheduleName = "cosine"
    width: Count = 12
    """Channels at 24x24 pixels; twice as many at 12x12, four times at 6x6."""
    num_train: Count = 5000
    """Canvases to train on."""
    num_test: Count = 1000
    """Canvases to test on, of other digits."""
    data_seed: int = 0
    """Seed of the canvases."""

    def data(self, config: DataConfig) -> Data:
        train, test, digits = load_canvases(config, self.num_train, self.num_test, self.data_seed)
        pairs = torch.bincount(256 * train.masks.flatten().long() + train.images.flatten(), minlength=CLASSES * 256)
        self.by_brightness = pairs.view(CLASSES, 256).argmax(0).tolist()  # the class that a threshold can know
        sets = Resident(train.images, train.masks), Resident(test.images, test.masks)
        classes = ("paper", *digits.classes)
        return Data(*sets, f"canvases of {digits.source}", as_floats, classes=classes, note=digits.note)

    def networks(self) -> dict[str, nn.Module]:
        return {"model": UNet(self.width)}

    def optimizer(self, name: str, network: nn.Module) -> optim.Optimizer:
        return optim.Adam(network.parameters(), lr=self.lr, fused=True)

    def loss(self, networks: Networks, batch: Batch) -> Tensor:
        """Cross-entropy per pixel, [k]; a pixel of paper, of which there are most, counts a fifth."""
        images, masks = batch
        losses = F.cross_entropy(networks["model"](images), masks.long(), reduction="none")
        return torch.where(masks == 0, PAPER * losses, losses).mean((1, 2))

    def answers(self, networks: Networks, images: Tensor) -> dict[str, Tensor]:
        """Each pixel's class, int64 [k, 48, 48], by the network, and by thresholds of its brightness."""
        table = torch.tensor(self.by_brightness, device=images.device)
        by_threshold = table[(255 * images[:, 0]).round().long()]
        return {"network": networks["model"](images).argmax(1), "thresholds": by_threshold}

    def score(self, networks: Networks, batch: Batch) -> Mapping[str, Tensor | Total]:
        images, masks = batch
        found = {
            name: Total(overlaps(said, masks.long(), CLASSES)) for name, said in self.answers(networks, images).items()
        }
        return {"loss": self.loss(networks, batch), **found}

    def set_scores(self, means: Mapping[str, float], totals: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Intersection over union, mean over the classes that occur, paper among them."""
        found = {name: (common / either)[either > 0] for name, (common, either) in totals.items()}
        return {f"miou/{name}": iou.mean().item() for name, iou in found.items()}

    def preview(self, data: Data) -> dict[str, Any]:
        images, masks = data.inputs(data.train, 0, SHOWN)
        rows = {"canvas": 1 - images[:, 0], "mask": painted(images[:, 0], masks.long())}
        picture = quality.image_rows(rows, f"{self.name} on {data.source}: the first training images", scale=1.1)
        return {"training_images": with_legend(picture, data.classes[1:])}

    def figures(self, networks: Networks, data: Data, history: History) -> dict[str, Any]:
        images, masks = data.inputs(data.test, 0, SHOWN)
        shown = {"truth": masks.long(), "network": networks["model"](images).argmax(1)}
        rows = {"canvas": 1 - images[:, 0]} | {name: painted(images[:, 0], said) for name, said in shown.items()}
        picture = quality.image_rows(rows, f"{self.name} on {data.source}: test canvases", scale=1.1)
        counts = {"network": torch.zeros(2, CLASSES), "thresholds": torch.zeros(2, CLASSES)}
        for start in range(0, len(data.test), 250):
            images, masks = data.inputs(data.test, start, start + 250)
            for name, said in self.answers(networks, images).items():
                counts[name] += overlaps(said, masks.long(), CLASSES).cpu()
        return {"overlay": with_legend(picture, data.classes[1:]), "iou_by_class": iou_by_class(counts, data.classes)}

    def predict(self, networks: Networks, inputs: Inputs) -> Answers:
        """How many pixels of a canvas each digit has, and the canvas with these painted."""
        images, _ = inputs.batch()
        masks = networks["model"](images).argmax(1)
        counts = torch.stack([torch.bincount(mask.flatten(), minlength=CLASSES) for mask in masks])[:, 1:]
        columns = {f"of {digit}": column for digit, column in zip(inputs.classes[1:], counts.T, strict=True)}
        return Answers(columns, images=painted(images[:, 0], masks))
