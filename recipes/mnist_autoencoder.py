"""Handwritten digits compressed to a few numbers and denoised by an autoencoder,
784-512-256-N-256-512-784 (document 002, section 4).

    accelerate launch launch/train.py recipes/mnist_autoencoder.py

Measured: squared error per pixel, 0 to 1, of MNIST's 10,000 test images 0.0069
(0.0068 to 0.0071; PCA of the same width 0.0168), with noise of deviation 0.3
0.0101 (0.0100 to 0.0102; PCA 0.0229, untouched 0.0466), 49 s (medians and
ranges of 3 seeds, 2026-11-30, two threads of a 2-core AMD EPYC). `--bottleneck
2`, after 1 epoch: 0.0507 (PCA 0.0557) and 0.0512 (0.0572; 1 seed, 2026-11-21).

Differences from the document: it only surveys the family, without network, data
or figure. Chosen here: fully connected layers, and in training noise of any
level up to `--noise`, since one level alone harms images without noise.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from nndist import Amount, Answers, Batch, Count, History, Inputs, Networks, Recipe, ScheduleName
from nndist.data import Data, DataConfig, ExampleRandom, ExampleSet, Resident, Tensors
from nndist.datasets.mnist import digits
from nndist.figures import generated_images as quality

SHOWN = 14  # images in a row of the figures


class Autoencoder(nn.Module):
    def __init__(self, bottleneck: int) -> None:
        super().__init__()
        narrowing = (nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, bottleneck))
        widening = (nn.Linear(bottleneck, 256), nn.ReLU(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 784))
        self.encoder = nn.Sequential(*narrowing)
        self.decoder = nn.Sequential(*widening, nn.Sigmoid())

    def forward(self, pixels: Tensor) -> Tensor:  # [k, 784], from 0 to 1
        return self.decoder(self.encoder(pixels))  # [k, 784], through [k, bottleneck]


@dataclass(kw_only=True)
class MnistAutoencoder(Recipe):
    """Digits through a bottleneck."""

    document = "002, section 4"
    headline = ("test/reconstruction_error", "test/loss")

    epochs: int = 15
    batch_size: int = 128
    lr: float = 1e-3
    schedule: ScheduleName = "cosine"
    bottleneck: Count = 32
    """Numbers that an image is compressed to."""
    noise: Amount = 0.3
    """Standard deviation of the noise to remove, for pixels from 0 to 1; 0 means compression only."""
    data_seed: int = 0
    """Seed of the noise in the test images."""

    def data(self, config: DataConfig) -> Data:
        data = digits(config, flat_pixels)
        fixed = self.with_fixed_noise
        return replace(data, test=fixed(data.test), for_evaluation=fixed, augment=self.with_noise)

    def with_fixed_noise(self, digits: ExampleSet) -> Resident:
        """Pair each test image with a fixed noisy version."""
        assert isinstance(digits, Resident)
        images, labels = digits.tensors
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(self.data_seed))
        return Resident(images, labels, (images + 255 * self.noise * noise).round().clamp(0, 255).to(torch.uint8))

    def with_noise(self, batch: Tensors, random: ExampleRandom) -> Tensors:
        """Pair each training image with a noisy version, new in each epoch, with a random level up to `noise`."""
        pixels, labels = batch
        level = self.noise * random.uniform()  # with one level only, it would never see clean images
        return pixels, labels, (pixels + level * random.normal(784)).clamp(0, 1)

    def networks(self) -> dict[str, nn.Module]:
        return {"model": Autoencoder(self.bottleneck)}

    def optimizer(self, name: str, network: nn.Module) -> optim.Optimizer:
        return optim.Adam(network.parameters(), lr=self.lr, fused=True)

    def loss(self, networks: Networks, batch: Batch) -> Tensor:
        """Squared error per pixel of the reconstructions of the noisy images, [k]."""
        pixels, _, noisy = batch
        return (networks["model"](noisy) - pixels).square().mean(1)

    def score(self, networks: Networks, batch: Batch) -> dict[str, Tensor]:
        """The loss, and the same for the reconstructions of the clean images."""
        pixels, labels, _ = batch
        alone = self.loss(networks, (pixels, labels, pixels))
        return {"loss": self.loss(networks, batch), "reconstruction_error": alone}

    def figures(self, networks: Networks, data: Data, history: History) -> dict[str, Any]:
        model = networks["model"]
        assert isinstance(model, Autoencoder)
        pixels, labels, noisy = data.inputs(data.test)
        mean, directions = quality.principal_components(data.inputs(data.train)[0], self.bottleneck)

        def through(images: Tensor) -> dict[str, Tensor]:
            return {"autoencoder": model(images), "PCA": (images - mean) @ directions @ directions.T + mean}

        made = {"reconstructed": through(pixels)}
        if self.noise:
            made["denoised"] = {f"noise {self.noise:g}": noisy, **through(noisy)}
        title = f"{self.name} on {data.source}, {self.bottleneck} numbers for 784 pixels"
        drawn = {name: compared(pixels, rows, f"{title}: {name} test images") for name, rows in made.items()}
        lines = [f"{name:<14} {row:<12} {F.mse_loss(x, pixels):.5f}" for name in made for row, x in made[name].items()]
        drawn["errors"] = "\n".join([f"{title}: squared error per pixel, {len(pixels):,} test images", *lines])
        codes = model.encoder(pixels)
        if self.bottleneck > 1:
            drawn["code"] = quality.plane(codes, labels, data.classes, f"{title}: code of {len(codes):,} test images")
        if self.bottleneck == 2:
            drawn["decoded"] = decoded(codes, model.decoder, f"{title}: decoded from points of the code's plane")
        return drawn

    def predict(self, networks: Networks, inputs: Inputs) -> Answers:
        pixels = inputs.batch()[0]
        made = networks["model"](pixels)
        return Answers({"error per pixel": (made - pixels).square().mean(1)}, images=made.unflatten(1, (28, 28)))


def flat_pixels(batch: Tensors) -> Tensors:
    """uint8 images as floats from 0 to 1, [k, 784]; noisy ones too, if there are any."""
    images, labels, *noisy = batch
    return (images.flatten(1) / 255, labels, *(more.flatten(1) / 255 for more in noisy))


def compared(pixels: Tensor, made: dict[str, Tensor], title: str) -> Any:
    """The first images, [k, 784], above their reconstructions, with the error over all images."""
    rows = {"digits": pixels} | {f"{name}\nerror {F.mse_loss(x, pixels):.4f}": x for name, x in made.items()}
    return quality.image_rows({name: x[:SHOWN].unflatten(1, (28, 28)) for name, x in rows.items()}, title)


def decoded(codes: Tensor, decoder: nn.Module, title: str) -> Any:
    """Images decoded from a grid of points over the middle of the codes, [k, 2]."""
    low, high = codes.quantile(torch.tensor([0.02, 0.98], device=codes.device), dim=0)
    x, y = (low + (high - low) * torch.linspace(0, 1, 16, device=codes.device).unsqueeze(1)).T
    rows = {f"{v:.2f}": decoder(torch.stack([x, v.expand(16)], 1)).unflatten(1, (28, 28)) for v in y.flip(0)}
    return quality.image_rows(rows, title, [f"{v:.2f}" for v in x])
