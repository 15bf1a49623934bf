"""Whether two images show the same digit, of digits never seen: an embedding by
a convolutional network (CNN), as for faces (document 002, section 4).

    accelerate launch launch/train.py recipes/digits_embedding.py

Measured: equal error of pairs of MNIST's test 7, 8 and 9, trained on 0 to 6,
0.323 (0.314 to 0.336), by the pixels' cosine 0.373, 1.5 s (medians and ranges
of 3 seeds, 2026-11-30, two threads of a 2-core AMD EPYC).

Differences from the document, which only names face recognition: digits stand
for faces, of which no free set is at hand; a loss with a margin (CosFace, Wang
et al. 2018).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Gt
from torch import Tensor, nn, optim

from nndist import Amount, Answers, Batch, Count, History, Inputs, Networks, Recipe, ScheduleName, Total, Weighted
from nndist.data import Data, DataConfig, ExampleSet, Resident, Tensors
from nndist.datasets.mnist import digits
from nndist.figures.embeddings import neighbours, verification
from nndist.metrics import equal_error_rate

KNOWN = 7  # digits 0 to 6 are trained on


class Embedding(nn.Module):
    """Images as directions; each known class has one, too."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(  # [k, 1, 28, 28]
            *(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU()),  # [k, 16, 14, 14]
            *(nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU(), nn.Flatten()),  # [k, 32, 7, 7]
            nn.Linear(32 * 7 * 7, size),
        )
        self.classes = nn.Parameter(torch.randn(KNOWN, size))

    def forward(self, images: Tensor) -> Tensor:  # [k, size], of length 1
        return F.normalize(self.layers(images), dim=1)


@dataclass(kw_only=True)
class DigitsEmbedding(Recipe):
    """Same digit or not."""

    document = "002, section 4"
    channels_last = True
    headline = ("test/equal_error/network", "test/equal_error/pixels")

    batch_size: int = 64
    lr: float = 1e-3
    schedule: ScheduleName = "cosine"
    size: Count = 32
    """Numbers of an embedding."""
    margin: Amount = 0.3
    """What an image's cosine with its class must exceed those with others by."""
    scale: Annotated[float, Gt(0)] = 12.0
    """What cosines are multiplied by in the loss."""
    data_seed: int = 0
    """Seed of the pairs that it is tested on."""

    def data(self, config: DataConfig) -> Data:
        data = digits(config, prepared)
        train, test = (self.some(part, known) for part, known in ((data.train, True), (data.test, False)))
        return replace(data, train=train, test=self.in_pairs(test), for_evaluation=self.in_pairs)

    def some(self, examples: ExampleSet, known: bool) -> Resident:
        """The examples of known classes, or of the others."""
        assert isinstance(examples, Resident)
        images, labels = examples.tensors
        chosen = (labels < KNOWN) == known
        return Resident(images[chosen], labels[chosen])

    def in_pairs(self, examples: ExampleSet) -> Resident:
        """Each image with another one, of its class in half the pairs; whether it is; and the pair's number."""
        assert isinstance(examples, Resident)
        images, labels = examples.tensors
        chances = torch.rand(len(labels), len(labels) + 1, generator=torch.Generator().manual_seed(self.data_seed))
        same = chances[:, -1:] < 0.5
        fits = ((labels[:, None] == labels) == same) & ~torch.eye(len(labels), dtype=torch.bool)
        others = (chances[:, :-1] * fits).argmax(1)
        return Resident(images, labels, images[others], same[:, 0].float(), torch.arange(len(labels)))

    def networks(self) -> dict[str, nn.Module]:
        return {"model": Embedding(self.size)}

    def optimizer(self, name: str, network: nn.Module) -> optim.Optimizer:
        return optim.Adam(network.parameters(), lr=self.lr, fused=True)

    def loss(self, networks: Networks, batch: Batch) -> Tensor:
        """Cross-entropy of the scaled cosines with the classes, after the margin is taken off the right one, [k]."""
        model = networks["model"]
        assert isinstance(model, Embedding)
        cosines = model(batch[0]) @ F.normalize(model.classes, dim=1).T
        right = F.one_hot(batch[1], KNOWN)
        return F.cross_entropy(self.scale * (cosines - self.margin * right), batch[1], reduction="none")

    def score(self, networks: Networks, batch: Batch) -> Mapping[str, Weighted | Total]:
        """Mean cosine of pairs of the same class and of others; for each pair what is known of it, in its own row."""
        images, _, others, same, numbers = batch
        by_network, by_pixels = similarities(networks["model"], images, others).values()
        rows = torch.zeros(60_000, 3, device=images.device)
        rows[numbers] = torch.stack([same + 1, by_network, by_pixels], 1)
        cosines = {"cosine/same": Weighted(by_network, same), "cosine/other": Weighted(by_network, 1 - same)}
        return {**cosines, "pairs": Total(rows)}

    def set_scores(self, means: Mapping[str, float], totals: Mapping[str, Tensor]) -> Mapping[str, float]:
        same, *found = totals["pairs"][totals["pairs"][:, 0] > 0].T
        names = ("network", "pixels")
        return {f"equal_error/{n}": equal_error_rate(x, same - 1) for n, x in zip(names, found, strict=True)}

    def figures(self, networks: Networks, data: Data, history: History) -> dict[str, Any]:
        images, labels, others, same, _ = data.inputs(data.test)
        model, title = networks["model"], f"{self.name} on {data.source}, classes not trained on"
        curve = verification(similarities(model, images, others), same, f"{title}: {len(same):,} pairs")
        nearest = neighbours((images[:, 0] + 1) / 2, labels, model(images), f"{title}: wrong ones are red")
        return {"verification": curve, "neighbours": nearest}

    def predict(self, networks: Networks, inputs: Inputs) -> Answers:
        """How similar each image is to the first one given."""
        found = networks["model"](inputs.batch()[0])
        return Answers({"cosine with the first": found @ found[0]})


def prepared(batch: Tensors) -> Tensors:
    """uint8 images, [k, 28, 28], and the others of pairs, if any, as floats from -1 to 1, [k, 1, 28, 28]."""
    return tuple(x.unsqueeze(1) / 127.5 - 1 if x.dtype == torch.uint8 else x for x in batch)


def similarities(network: nn.Module, images: Tensor, others: Tensor) -> dict[str, Tensor]:
    """Cosines of pairs of images, [k], by the network's embeddings and by their pixels' ink."""
    by_pixels = F.cosine_similarity(images.flatten(1) + 1, others.flatten(1) + 1)
    return {"network": (network(images) * network(others)).sum(1), "pixels": by_pixels}
