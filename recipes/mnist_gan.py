"""Handwritten digits generated from noise by a generative adversarial network
(GAN), two networks that train against each other (document 002, section 4).

    accelerate launch launch/train.py recipes/mnist_gan.py

Measured: all 10 digits appear among 1,000 generated images, the rarest with 6.2
% (6.2 to 7.3); a classifier that reads 97.5 % of MNIST's test set right reads
them with a mean confidence of 83.3 % (82.8 to 83.3; real images 98.1 %); the
Frechet distance of its features to the test set's is 62.1 (50.7 to 64.3; real
images 16.9), 98 s (the first of 3 seeds, the range of all; 2026-11-30, two
threads of a 2-core AMD EPYC).

Differences from the document, a survey: BatchNorm in the generator only, Adam's
first moment of 0.5 as in DCGAN (Radford et al. 2015), the non-saturating loss
(Goodfellow et al. 2014), a learning rate that decays to 0.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from nndist import Answers, Batch, Count, History, Inputs, Networks, Objective, Recipe, ScheduleName
from nndist.data import Data, DataConfig, ExampleRandom, ExampleSet, Resident, Tensors, scale_images
from nndist.datasets.mnist import digits
from nndist.figures import generated_images as quality

NUM_SAMPLES = 1000  # that the quality is measured on
SHOWN, MAX_ROWS = 14, 12  # columns and rows of the samples over time


def make_generator(noise: int, width: int) -> nn.Module:
    return nn.Sequential(  # [k, noise]
        nn.Linear(noise, 2 * width * 7 * 7, bias=False),  # BatchNorm has a bias
        nn.Unflatten(1, (2 * width, 7, 7)),
        *(nn.BatchNorm2d(2 * width), nn.ReLU()),
        nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, bias=False),  # [k, width, 14, 14]
        *(nn.BatchNorm2d(width), nn.ReLU()),
        nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1),  # [k, 1, 28, 28]
        nn.Tanh(),
    )


def make_discriminator(width: int) -> nn.Module:
    """Without BatchNorm, so that its output for an image does not depend on the rest of the batch."""
    return nn.Sequential(  # [k, 1, 28, 28], from -1 to 1
        *(nn.Conv2d(1, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)),  # [k, width, 14, 14]
        *(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)),  # [k, 2 * width, 7, 7]
        *(nn.Flatten(), nn.Linear(2 * width * 7 * 7, 1), nn.Flatten(0)),  # [k], above 0 for a real image
    )


@dataclass(kw_only=True)
class MnistGAN(Recipe):
    """Digits generated from noise."""

    document = "002, section 4"
    channels_last = True
    headline = ("quality_text",)

    epochs: int = 6
    batch_size: int = 64
    lr: float = 1e-3
    schedule: ScheduleName = "cosine"
    noise: Count = 64
    """Random numbers that an image is generated from."""
    width: Count = 32
    """Channels of the convolutions at 14x14; twice as many at 7x7."""
    data_seed: int = 0
    """Seed of the noise for evaluations."""

    def data(self, config: DataConfig) -> Data:
        data = digits(config, scale_images(mean=0.5, std=0.5))  # the labels are for measuring quality only
        fixed = self.with_fixed_noise
        return replace(data, test=fixed(data.test), for_evaluation=fixed, augment=self.with_noise)

    def with_fixed_noise(self, digits: ExampleSet) -> Resident:
        """Pair each test image with fixed noise for one generated image."""
        assert isinstance(digits, Resident)
        noise = torch.randn(len(digits), self.noise, generator=torch.Generator().manual_seed(self.data_seed))
        return Resident(*digits.tensors, noise)

    def with_noise(self, batch: Tensors, random: ExampleRandom) -> Tensors:
        """Pair each training image with noise for one generated image."""
        return (*batch, random.normal(self.noise))

    def networks(self) -> dict[str, nn.Module]:
        return {"discriminator": make_discriminator(self.width), "generator": make_generator(self.noise, self.width)}

    def optimizer(self, name: str, network: nn.Module) -> optim.Optimizer:
        return optim.Adam(network.parameters(), lr=self.lr, betas=(0.5, 0.999), fused=True)

    def objectives(self) -> dict[str, Objective]:
        return {"discriminator": self.discriminator_loss, "generator": self.generator_loss}

    def discriminator_loss(self, networks: Networks, batch: Batch) -> Tensor:
        """Cross-entropy of classifying a real and a generated image, summed: 2 ln 2 by guessing."""
        images, _, noise = batch
        judged_real = networks["discriminator"](images)
        judged_generated = networks["discriminator"](networks["generator"](noise).detach())
        return F.softplus(-judged_real) + F.softplus(judged_generated)

    def generator_loss(self, networks: Networks, batch: Batch) -> Tensor:
        """Cross-entropy of a generated image being classified as real: ln 2 if the discriminator guesses."""
        return F.softplus(-networks["discriminator"](networks["generator"](batch[-1])))

    def score(self, networks: Networks, batch: Batch) -> dict[str, Tensor]:
        """Both losses, and the discriminator's accuracy on real and on generated images."""
        images, _, noise = batch
        real, generated = networks["discriminator"](images), networks["discriminator"](networks["generator"](noise))
        return {
            "loss/discriminator": F.softplus(-real) + F.softplus(generated),
            "loss/generator": F.softplus(-generated),
            "accuracy/real": (real > 0).float(),
            "accuracy/generated": (generated < 0).float(),
        }

    def snapshot(self, networks: Networks, data: Data) -> dict[str, Tensor]:
        """Images generated from the same noise at each evaluation, uint8 [SHOWN, 28, 28]."""
        ink = (networks["generator"](data.inputs(data.test, 0, SHOWN)[-1]) + 1) / 2
        return {"samples": (255 * ink).round().to(torch.uint8).squeeze(1)}

    def figures(self, networks: Networks, data: Data, history: History) -> dict[str, Any]:
        title = f"{self.name} on {data.source}"
        measured = quality.measure(networks["generator"](data.inputs(data.test, 0, NUM_SAMPLES)[-1]), data)
        drawn = {"quality": measured.figure(title), "quality_text": measured.text()}
        if history.snapshots:
            drawn["samples"] = samples(history.snapshots, title)
        return drawn

    def predict(self, networks: Networks, inputs: Inputs) -> Answers:
        """New images; for given images, whether the discriminator classifies them as real."""
        images = inputs.batch()[0] if len(inputs) else networks["generator"](inputs.noise(self.noise))
        real = networks["discriminator"](images).sigmoid()
        return Answers({"probability real": real}, images=None if len(inputs) else (images.squeeze(1) + 1) / 2)


def samples(snapshots: list[tuple[int, dict[str, Tensor]]], title: str) -> Any:
    """Generated images, a row for each evaluation; at most MAX_ROWS of them, the last one always."""
    shown = snapshots[:: -math.ceil(len(snapshots) / MAX_ROWS)][::-1]
    rows = {f"step {step:,}": tensors["samples"] / 255 for step, tensors in shown}
    return quality.image_rows(rows, f"{title}: what the generator makes of the same {SHOWN} pieces of noise")
