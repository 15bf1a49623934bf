"""Handwritten digits classified by a small vision transformer: 16 patches of 7x7
pixels and a class token, 3 layers of width 64 (document 002, section 4).

    accelerate launch launch/train.py recipes/mnist_vit.py

Measured: 98.90 % (98.90 to 99.06) of MNIST's test set after 10 epochs, 2.1
minutes (median and range of 3 seeds, 2026-11-30, two threads of a 2-core AMD
EPYC). figures/attention.png shows which patches the class token attends to.

Differences from the document: it only surveys the family, without network, data
or figure. Chosen here: class token and learned positions as in Dosovitskiy et
al. 2020, normalisation before each block, patches of 7 pixels, since 16 tokens
are fast on a CPU (`--patch 4` makes 49), and training images shifted by up to 2
pixels, since a transformer is not shift-invariant.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn, optim

from nndist import Amount, Classifier, Count, History, Networks, ScheduleName, UserError
from nndist.data import Data, DataConfig, ExampleRandom, Tensors, scale_images
from nndist.datasets.mnist import digits
from nndist.figures import generated_images as quality

STD = 0.3  # of MNIST's pixels, about


class VisionTransformer(nn.Module):
    def __init__(self, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        patches = (28 // patch) ** 2
        self.embed = nn.Conv2d(1, width, patch, stride=patch)  # a linear layer on each patch
        self.class_token = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(0.02 * torch.randn(1 + patches, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.classify = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:  # [k, 1, 28, 28]
        return self.classify(self.encoder(self.tokens(images))[:, 0])  # [k, 10], from the class token

    def tokens(self, images: Tensor) -> Tensor:
        """The class token, then a token for each patch, row by row: [k, 1 + patches, width]."""
        patches = self.embed(images).flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(images.shape[0], 1, -1), patches], 1) + self.positions

    def attention(self, images: Tensor) -> Tensor:
        """The class token's attention to the patches in each layer, mean over heads.

        [k, depth, patches]; its attention to itself is left out, so sums are below 1.
        """
        tokens, maps = self.tokens(images), []
        for layer in self.encoder.layers:
            assert isinstance(layer, nn.TransformerEncoderLayer)
            given = layer.norm1(tokens)
            _, weights = layer.self_attn(given, given, given)  # [k, 1 + patches, 1 + patches]
            maps.append(weights[:, 0, 1:])
            tokens = layer(tokens)
        return torch.stack(maps, 1)


@dataclass(kw_only=True)
class MnistViT(Classifier):
    """Digits read by a vision transformer."""

    document = "002, section 4"

    epochs: int = 10
    batch_size: int = 100
    lr: float = 2e-3
    schedule: ScheduleName = "one-cycle"
    clip_norm: float | None = 1.0
    weight_decay: Amount = 0.05
    """Decoupled weight decay of AdamW."""
    patch: Literal[4, 7] = 7
    """Side of a patch in pixels: 7 for 16 patches, 4 for 49."""
    width: Count = 64
    """Features per token."""
    depth: Count = 3
    """Layers."""
    heads: Count = 4
    """Attention heads per layer."""
    shift: Annotated[int, Interval(ge=0, le=27)] = 2
    """Largest random shift of training images, in pixels, in either direction."""

    def validate(self) -> None:
        super().validate()
        if self.width % self.heads:
            raise UserError(f"--width {self.width}: must be a multiple of --heads {self.heads}, which share it")

    def data(self, config: DataConfig) -> Data:
        data = digits(config, scale_images(mean=0.0, std=STD))  # the background stays 0
        data.augment = self.moved
        return data

    def moved(self, batch: Tensors, random: ExampleRandom) -> Tensors:
        """Shift each image by up to `shift` pixels along both axes."""
        images, labels = batch
        corners = (random.uniform(2) * (2 * self.shift + 1)).long()  # [k, 2], from 0 to 2 * shift
        side = torch.arange(28, device=images.device)
        rows, columns = (corners[:, axis, None] + side for axis in (0, 1))  # [k, 28]
        padded = F.pad(images, (self.shift,) * 4)
        examples = torch.arange(len(images), device=images.device)[:, None, None]
        return padded[examples, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1), labels

    def networks(self) -> dict[str, nn.Module]:
        return {"model": VisionTransformer(self.patch, self.width, self.depth, self.heads)}

    def optimizer(self, name: str, network: nn.Module) -> optim.Optimizer:
        return optim.AdamW(network.parameters(), lr=self.lr, weight_decay=self.weight_decay, fused=True)

    def figures(self, networks: Networks, data: Data, history: History) -> dict[str, Any]:
        model = networks["model"]
        assert isinstance(model, VisionTransformer)
        title = f"{self.name} on {data.source}: where the class token looks, by layer"
        return {**super().figures(networks, data, history), "attention": attention_maps(model, data, title)}


def attention_maps(model: VisionTransformer, data: Data, title: str) -> Any:
    """The first test image of each class, and per layer the class token's attention to each patch."""
    images, labels = data.inputs(data.test)
    first = torch.stack([(labels == c).nonzero()[0, 0] for c in range(len(data.classes))])
    images, maps = images[first], model.attention(images[first]).unflatten(2, (28 // model.embed.stride[0],) * 2)
    probabilities = model(images).softmax(1)
    captions = [f"{data.classes[int(p.argmax())]}\n{p.max():.0%}" for p in probabilities]
    ink = (images[:, 0] * STD).cpu()  # from 0 to 1
    rows = {"test image": ink}
    tint = torch.tensor([0.0, 0.55, 1.0])  # what full attention subtracts from white, leaving orange
    for layer in range(maps.shape[1]):
        shares = F.interpolate(maps[:, layer, None].cpu(), size=28)[:, 0]  # [10, 28, 28]
        shares = shares / shares.amax((1, 2), keepdim=True)
        rows[f"layer {layer + 1}"] = (1 - shares[..., None] * tint) * (1 - 0.8 * ink[..., None])
    return quality.image_rows(rows, f"{title} (orange; the most in an image is full orange)", captions)
