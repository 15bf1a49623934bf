"""Photographs classified by a residual network (document 002, section 4).

    accelerate launch launch/train.py recipes/imagenet_resnet.py --images FOLDER

FOLDER holds train/<class>/*.JPEG and val/<class>/*.JPEG (default: imagenet in
--data-dir). If it outgrows the disk, launch/shard.py makes shards of it, which
--shards reads from a path or URL. At 224 pixels an evaluation needs less memory
with --eval-batch-size 250. Without images the run uses generated textures.

Measured: 82.81 % (78.12 to 87.50) of 64 generated textures, 100 % top-5 (98.4
to 100), after 90 epochs on 128 others, 9.7 s (medians and ranges of 3 seeds,
2026-11-30, two threads of a 2-core AMD EPYC). ImageNet itself was not available
and has not been trained here. The settings are those of He et al. 2015
(https://arxiv.org/abs/1512.03385) as Goyal et al. 2017
(https://arxiv.org/abs/1706.02677) changed them: batch 256, learning rate 0.1,
warm-up over 5 epochs, 90 in all, residual branches that start at zero; cosine
decay and label smoothing are from later work.

Differences from the document: it only surveys convolutional networks, without
this one. The network is torchvision's, with strides in the 3x3 convolutions.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn, optim

from nndist import Answers, Batch, Classifier, Inputs, Networks, Output, ScheduleName, schedules
from nndist.data import Data, DataConfig
from nndist.datasets.imagenet import imagenet, photographs
from nndist.recipe import Amount, Count, Fraction


@dataclass(kw_only=True)
class ImageNetResNet(Classifier):
    """Classifier of photographs by a ResNet."""

    document = "002, section 4"
    channels_last = True

    epochs: int = 90
    batch_size: int = 256
    lr: float = 0.1
    schedule: ScheduleName = "cosine"
    warmup_epochs: Annotated[int, Ge(0)] = 5
    """Warm-up in epochs, unless --warmup-steps gives it."""
    momentum: Fraction = 0.9
    """Momentum of SGD."""
    weight_decay: Amount = 1e-4
    """L2 penalty, times the weights, in the gradient."""
    label_smoothing: Fraction = 0.1
    """Share of the target spread over all classes."""
    depth: Literal[18, 34, 50, 101, 152] = 18
    """Number of layers."""
    images: Path | None = None
    """Folder with train/<class>/*.JPEG and val/<class>/*.JPEG (default: imagenet in the data folder)."""
    shards: str | None = None
    """Folder or URL with train.json, val.json and their shards, as launch/shard.py writes them; instead of --images."""
    window: Count = 16
    """Shards that examples are drawn from at any time."""
    decode_on: Literal["workers", "device"] = "workers"
    """Where JPEG files are decoded and cropped."""
    side: int | None = None
    """Pixels of the network's input (default: 224; for textures 16)."""

    num_classes = 1000  # not a field: data() sets it

    def lr_factor(self, step: int, total_steps: int) -> float:
        return schedules.lr_factor(
            step,
            total_steps,
            self.schedule,
            warmup_steps=self.warmup_steps or round(total_steps * self.warmup_epochs / self.epochs),
            decay_steps=self.decay_steps,
            decay_factor=self.decay_factor,
        )

    def data(self, config: DataConfig) -> Data:
        data = imagenet(
            config,
            images=self.images,
            shards=self.shards,
            side=self.side,
            window=self.window,
            decode_on=self.decode_on,
        )
        self.num_classes = len(data.classes)
        return data

    def networks(self) -> dict[str, nn.Module]:
        from torchvision.models import get_model  # takes a second to import, and only this recipe needs it

        return {"model": get_model(f"resnet{self.depth}", num_classes=self.num_classes, zero_init_residual=True)}

    def optimizer(self, name: str, network: nn.Module) -> optim.Optimizer:
        return optim.SGD(
            network.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, fused=True
        )

    def loss(self, networks: Networks, batch: Batch) -> Tensor:
        images, labels = batch
        return F.cross_entropy(
            networks["model"](images), labels, reduction="none", label_smoothing=self.label_smoothing
        )

    def score(self, networks: Networks, batch: Batch) -> dict[str, Tensor | Output]:
        """Cross-entropy without label smoothing, top-1 and top-5 accuracy."""
        images, labels = batch
        logits = networks["model"](images)
        best = logits.topk(min(5, logits.shape[1]), 1).indices
        return {
            "loss": F.cross_entropy(logits, labels, reduction="none"),
            "accuracy": (best[:, 0] == labels).float(),
            "accuracy_top5": (best == labels.unsqueeze(1)).any(1).float(),
            "logits": Output(logits),
        }

    def predict(self, networks: Networks, inputs: Inputs) -> Answers:
        return inputs.classified(networks["model"](photographs(inputs, self.side)))
