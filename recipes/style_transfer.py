"""Digits redrawn from plain to bold italic and back by two generative
adversarial networks (GAN) that never see a pair (document 002, section 4).

    accelerate launch launch/train.py recipes/style_transfer.py

Measured: a judge reads 73.1 % (70.3 to 73.6) of MNIST's redrawn test digits as
the digit in its new style, of those left as they are 0.5 %, of the true ones
93.6 %; the error per pixel to these is 0.106 (0.106 to 0.108), of those left
0.148, 8.0 s (medians and ranges of 3 seeds, 2026-11-30, two threads of a 2-core
AMD EPYC).

Other digits than the plain ones are slanted and thickened. The judge is a
classifier of 20 kinds, digits in both styles.

Differences from the document, which only names style transfer: the losses of
CycleGAN (Zhu et al. 2017), without that of leaving its own style alone.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn, optim

from nndist import Amount, Answers, Batch, Count, History, Inputs, Networks, Objective, Recipe, ScheduleName
from nndist.data import Data, DataConfig
from nndist.datasets.styles import CLASSES, error, judged, load_styles
from nndist.figures import generated_images as quality

OTHER = {"plain": "italic", "italic": "plain"}  # the styles


def block(channels: int, width: int, size: int = 3, stride: int = 1) -> nn.Module:
    """A convolution; BatchNorm has its bias."""
    layer = nn.Conv2d(channels, width, size, stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(width), nn.ReLU())


class Generator(nn.Module):
    """A small U-Net that begins near the digit itself; else two of them may agree on any code, such as its negative."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = block(1, width, size=4, stride=2)  # [k, width, 14, 14]
        self.deeper = nn.Sequential(
            block(width, 4 * width, size=4, stride=2),  # [k, 4 * width, 7, 7]
            *(block(4 * width, 4 * width), block(4 * width, 4 * width)),
            nn.PixelShuffle(2),  # [k, width, 14, 14]
        )
        self.up = nn.Sequential(nn.Conv2d(2 * width, 4, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, images: Tensor) -> Tensor:  # [k, 1, 28, 28], ink from 0 to 1
        beside = self.down(images)
        return torch.sigmoid(self.up(torch.cat([self.deeper(beside), beside], 1)) + 4 * images - 3)


def make_discriminator(width: int) -> nn.Module:
    """Judges 49 overlapping squares of 18x18 pixels: strokes rather than whole digits."""
    return nn.Sequential(
        *(nn.Conv2d(1, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)),  # [k, width, 14, 14]
        *(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)),  # [k, 2 * width, 7, 7]
        *(nn.Conv2d(2 * width, 1, 3, padding=1), nn.Flatten()),  # [k, 49], near 1 for a real image, else near 0
    )


@dataclass(kw_only=True)
class StyleTransfer(Recipe):
    """Digits redrawn in another style."""

    document = "002, section 4"
    channels_last = True
    headline = ("test/accuracy/network", "test/error/network", "test/error/as_is")

    batch_size: int = 16
    lr: float = 1e-3
    schedule: ScheduleName = "cosine"
    width: Count = 12
    """Channels of the convolutions at 14x14; up to four times as many at 7x7."""
    cycle: Amount = 3.0
    """Weight of what a digit lacks that was redrawn in the other style and back, beside the loss of fooling."""
    num_train: Count = 6_000
    """Digits to train on in each style; at most half of the training set."""

    def data(self, config: DataConfig) -> Data:
        data, self.judge = load_styles(config, self.num_train)
        return data

    def networks(self) -> dict[str, nn.Module]:
        discriminators = {f"{style}_discriminator": make_discriminator(self.width) for style in OTHER}
        return discriminators | {f"to_{style}": Generator(self.width) for style in OTHER}

    def optimizer(self, name: str, network: nn.Module) -> optim.Optimizer:
        return optim.Adam(network.parameters(), lr=self.lr, betas=(0.5, 0.999), fused=True)

    def objectives(self) -> dict[str, Objective]:
        judging = {f"{style}_discriminator": partial(self.discriminator_loss, style) for style in OTHER}
        return {**judging, **{f"to_{style}": partial(self.generator_loss, style) for style in OTHER}}

    def discriminator_loss(self, style: str, networks: Networks, batch: Batch) -> Tensor:
        """Squared error of judging a digit of the style as 1 and a redrawn one as 0, summed: 0.5 by guessing."""
        real, other = in_style(style, batch)
        judge, made = networks[f"{style}_discriminator"], networks[f"to_{style}"](other).detach()
        return ((judge(real) - 1).square() + judge(made).square()).mean(1)

    def generator_loss(self, style: str, networks: Networks, batch: Batch) -> Tensor:
        """Squared error of a redrawn digit being judged as 1, and the weighted error of both ways around."""
        real, other = in_style(style, batch)
        there, back = networks[f"to_{style}"], networks[f"to_{OTHER[style]}"]
        made = there(other)
        fooling = (networks[f"{style}_discriminator"](made) - 1).square().mean(1)
        return fooling + self.cycle * (error(back(made), other) + error(there(back(real).detach()), real))

    def score(self, networks: Networks, batch: Batch) -> dict[str, Tensor]:
        """See `judged`: of redrawn digits, of digits left as they are, and of the true ones."""
        plain, classes, slanted, classes_of_slanted, *truths = batch
        made = {"network": torch.cat(redrawn(networks, plain, slanted)), "as_is": torch.cat([plain, slanted])}
        wanted = torch.cat([classes + CLASSES, classes_of_slanted])
        return judged(self.judge, made | {"truth": torch.cat(truths)}, wanted)

    def figures(self, networks: Networks, data: Data, history: History) -> dict[str, Any]:
        plain, _, slanted, _, as_italic, as_plain = data.inputs(data.test, 0, 14)
        to_italic, to_plain = redrawn(networks, plain, slanted)
        and_back, back_again = redrawn(networks, to_plain, to_italic)[::-1]
        rows = {"plain": plain, "to italic": to_italic, "truth": as_italic, "and back": and_back}
        rows |= {"italic": slanted, "to plain": to_plain, "truth ": as_plain, "back again": back_again}
        title = f"{self.name} on {data.source}: test digits redrawn in the other style, and back"
        return {"styles": quality.image_rows({name: x[:, 0] for name, x in rows.items()}, title)}

    def predict(self, networks: Networks, inputs: Inputs) -> Answers:
        """Each image made italic and, beside it, made plain; how much of each picture is ink."""
        images = inputs.batch()[0]
        made = redrawn(networks, images, images)
        pictures = {"ink given": images, "ink in italics": made[0], "ink in plain": made[1]}
        return Answers({name: x.mean((1, 2, 3)) for name, x in pictures.items()}, images=torch.cat(made, 3)[:, 0])


def in_style(style: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """The digits of a style, and those of the other style."""
    return (batch[0], batch[2]) if style == "plain" else (batch[2], batch[0])


def redrawn(networks: Networks, plain: Tensor, slanted: Tensor) -> tuple[Tensor, Tensor]:
    """Plain digits in italics, and slanted ones plain."""
    return networks["to_italic"](plain), networks["to_plain"](slanted)
