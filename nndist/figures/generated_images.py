"""The quality of images that networks generate or encode: figures, and measurements by a classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batches import inputs_and_labels
from ..data.sets import Data, ExampleSet
from .plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A few seconds on one core, whatever the size of the data: figures are drawn after every run.
READER_STEPS = 300
READER_BATCH = 128
MAX_TRAINED_ON = 20_000
APPEARS_FROM = 0.01
"""The share of the images from which a class counts as appearing: a tenth of a fair share of ten classes."""


def image_rows(rows: Mapping[str, Tensor], title: str, columns: Sequence[str] = (), *, scale: float = 0.62) -> Figure:
    """Rows of images, each with its name on the left, and a title above each column.

    A row is [k, h, w], ink from 0 to 1, or [k, h, w, 3], colours from 0 to 1. An image is `scale` inches wide.
    """
    gap, strips = 2, []
    for images in rows.values():
        images = images.detach().float().cpu()
        colours = images if images.dim() == 4 else (1 - images).unsqueeze(3).expand(-1, -1, -1, 3)
        framed = F.pad(colours, (0, 0, 0, gap, 0, gap), value=1.0)
        strips.append(framed.transpose(0, 1).flatten(1, 2))  # [h + gap, k * (w + gap), 3]
    picture = torch.cat(strips)
    count, height, width = len(next(iter(rows.values()))), picture.shape[0] // len(rows), picture.shape[1]
    width //= count
    figure = new_figure(max(6.0, scale * count + 1.8), scale * len(rows) + (1.0 if columns else 0.8))
    axes = figure.add_subplot()
    axes.imshow(picture.clamp(0, 1).numpy(), interpolation="nearest")
    axes.set_yticks([height * (row + 0.5) for row in range(len(rows))], list(rows))
    axes.set_xticks([width * (column + 0.5) for column in range(len(columns))], list(columns))
    axes.tick_params(length=0, labelsize=9, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=10)
    return figure


def principal_components(vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The mean, [d], and the first `count` principal directions, [d, count], of vectors [n, d]."""
    mean = vectors.mean(0)
    _, directions = torch.linalg.eigh((vectors - mean).T.cov())  # by increasing variance
    return mean, directions[:, -count:].flip(1)


def plane(points: Tensor, labels: Tensor, classes: Sequence[str], title: str) -> Figure:
    """Points, [k, 2 or more], coloured by class; beyond two dimensions, their first two principal components."""
    axis = "number {}"
    if points.shape[1] > 2:
        mean, directions = principal_components(points, 2)
        points, axis = (points - mean) @ directions, "principal component {}"
    figure = new_figure(8.0, 6.6)
    axes = figure.add_subplot()
    for label, name in enumerate(classes):
        x, y = points[labels == label].T.cpu()
        axes.scatter(x.tolist(), y.tolist(), s=5, color=f"C{label}", alpha=0.6, linewidths=0, label=name)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=4)
    axes.set_xlabel(axis.format(1))
    axes.set_ylabel(axis.format(2))
    axes.set_title(title, fontsize=10)
    return figure


class Reader(nn.Module):
    """A convolutional classifier of 28x28 images; an image's features are the outputs of its last hidden layer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 64),
            nn.ReLU(),
        )
        self.classify = nn.Linear(64, classes)

    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [k, 64] and probabilities [k, classes] of images [k, 1, 28, 28]."""
        parts = []
        with torch.no_grad():
            for part in images.split(1000):
                features = self.features(part)
                parts.append((features, self.classify(features).softmax(1)))
        features, probabilities = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return features, probabilities


@dataclass(frozen=True)
class Quality:
    """A classifier's judgement of generated images, and of as many real ones for comparison.

    shares: share of the images classified as each class, [classes]; they sum to 1.
    confidences: probability of each image's predicted class, [k].
    distance: Frechet distance of the features to those of the test images; not 0 for real images either, since they are
    a sample.
    accuracy: the classifier's accuracy on the test images, from 0 to 1.
    """

    classes: Sequence[str]
    shares: Tensor
    real_shares: Tensor
    confidences: Tensor
    real_confidences: Tensor
    distance: float
    real_distance: float
    accuracy: float

    @property
    def appearing(self) -> int:
        """The number of classes that make up at least a hundredth of the images."""
        return int((self.shares >= APPEARS_FROM).sum())

    def text(self) -> str:
        """The measurements in a few lines."""
        rarest = int(self.shares.argmin())
        return "\n".join(
            [
                f"{len(self.confidences):,} generated images, read by a classifier that reads {self.accuracy:.1%} of "
                "the test images right:",
                f"{self.appearing} of {len(self.classes)} classes appear ({APPEARS_FROM:.0%} or more); "
                f"the rarest is {self.classes[rarest]} with {self.shares[rarest]:.1%}",
                f"mean confidence {self.confidences.mean():.1%} (real images {self.real_confidences.mean():.1%})",
                f"Frechet distance to the test images {self.distance:,.1f} (real images {self.real_distance:,.1f})",
            ]
        )

    def figure(self, title: str) -> Figure:
        """Generated and real images by class, and by the classifier's confidence."""
        figure = new_figure(10.0, 4.6)
        shares, confidence = figure.subplots(1, 2)
        edges = [0.0, 0.5, 0.8, 0.95, 0.99]
        bins = [f"< {edges[1]:.0%}", *(f"{a:.0%} to {b:.0%}" for a, b in pairwise(edges[1:]))]
        panels = (
            (shares, self.classes, (self.shares, self.real_shares), "read as"),
            (
                confidence,
                [*bins, f"> {edges[-1]:.0%}"],
                [binned(values, edges) for values in (self.confidences, self.real_confidences)],
                "classifier's confidence",
            ),
        )
        for axes, names, values, label in panels:
            for offset, kind, color, of_kind in ((-0.2, "generated", "tab:blue", 0), (0.2, "real", "0.7", 1)):
                places = [place + offset for place in range(len(names))]
                axes.bar(places, (100 * values[of_kind]).tolist(), width=0.4, color=color, label=kind)
            crowded = len(names) * max(map(len, names)) > 60
            axes.set_xticks(range(len(names)), names, fontsize=8.5, rotation=40 if crowded else 0)
            axes.set_xlabel(label)
            axes.set_ylabel("share of the images, %")
            axes.legend(loc="best", fontsize="small")
        shares.axhline(100 * APPEARS_FROM, color="tab:red", linewidth=0.8, linestyle=":")
        shares.set_ylim(0, max(20.0, 115 * float(self.shares.max())))
        shares.set_title(f"{self.appearing} of {len(self.classes)} classes appear (dotted: from {APPEARS_FROM:.0%})")
        confidence.set_title(
            f"mean confidence {self.confidences.mean():.1%}, real images {self.real_confidences.mean():.1%}"
        )
        for axes in (shares, confidence):
            axes.title.set_fontsize(10)
        figure.suptitle(
            f"{title}: {len(self.confidences):,} generated images, as a classifier reads them that has "
            f"{self.accuracy:.1%} of the test images right\n"
            f"Fréchet distance to the test images {self.distance:,.1f}; that of real training images "
            f"{self.real_distance:,.1f}",
            fontsize=10,
        )
        return figure


def measure(images: Tensor, data: Data, reader: Reader | None = None) -> Quality:
    """Judge images, [k, 1, 28, 28] as the networks see them, by a classifier, which is trained if none is given.

    The data's prepared batches begin with images and labels. The real images for comparison are the training set's
    last, which the classifier has not seen.
    """
    count = min(len(images), len(data.train) // 4)
    kept_apart = len(data.train) - count
    reader = reader or trained_reader(data, min(MAX_TRAINED_ON, kept_apart))
    real, _ = read_in(data, data.train, kept_apart, len(data.train))
    test, labels = read_in(data, data.test, 0, len(data.test))
    features, probabilities = reader.read(images)
    real_features, real_probabilities = reader.read(real)
    test_features, test_probabilities = reader.read(test)
    return Quality(
        classes=data.classes,
        shares=shares_of(probabilities),
        real_shares=shares_of(real_probabilities),
        confidences=probabilities.max(1).values.cpu(),
        real_confidences=real_probabilities.max(1).values.cpu(),
        distance=frechet_distance(features, test_features),
        real_distance=frechet_distance(real_features, test_features),
        accuracy=(test_probabilities.argmax(1) == labels).float().mean().item(),
    )


def reading(made: Mapping[str, Tensor], labels: Tensor, data: Data) -> str:
    """How often a classifier reads images as what they show, for several ways to make them, in a few lines.

    made: images of the test set's examples, [n, 1, 28, 28], and, under "real", themselves. labels: int64 [n].
    """
    reader = trained_reader(data, min(MAX_TRAINED_ON, len(data.train)))
    real_features, _ = reader.read(made["real"])
    lines = [f"{len(labels):,} test images of {data.source}, as a classifier of 28x28 pixels reads them:"]
    for name, images in made.items():
        features, probabilities = reader.read(images)
        right = (probabilities.argmax(1) == labels).float().mean()
        distance = frechet_distance(features, real_features)
        lines += [f"{name:<10} {right:6.1%} right, Frechet distance to the real ones {distance:,.1f}"]
    return "\n".join(lines)


def trained_reader(data: Data, count: int, steps: int = READER_STEPS) -> Reader:
    """A classifier trained on the first `count` training examples; deterministic."""
    images, labels = read_in(data, data.train, 0, count)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reader = Reader(len(data.classes)).to(images.device)
    batches = torch.randint(count, (steps, READER_BATCH), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(reader.parameters())
    for step, index in enumerate(batches.to(images.device)):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
        with torch.enable_grad():
            logits = reader.classify(reader.features(images[index]))
            F.cross_entropy(logits, labels[index]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return reader


def read_in(data: Data, examples: ExampleSet, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Prepared images and labels of examples start to stop."""
    return inputs_and_labels(data.inputs(examples, start, stop), "generated_images.measure: give it data of images")


def shares_of(probabilities: Tensor) -> Tensor:
    """The share of the images classified as each class."""
    counts = torch.bincount(probabilities.argmax(1), minlength=probabilities.shape[1])
    return (counts / counts.sum()).cpu()


def binned(values: Tensor, edges: Sequence[float]) -> Tensor:
    """The share of values between each edge and the next; the last bin is open."""
    places = torch.bucketize(values, torch.tensor(edges), right=True) - 1
    return torch.bincount(places, minlength=len(edges)) / len(values)


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """The Frechet distance between the normal distributions that fit two sets of features, [k, f] and [n, f].

    As in Heusel et al. 2017 (https://arxiv.org/abs/1706.08500), but for any features: distances are comparable only
    between features of the same classifier and sets of the same size.
    """
    one, other = one.double(), other.double()
    root = square_root(one.T.cov())
    # the trace of the square root of the covariances' product, by a symmetric matrix with the same eigenvalues
    mixed = torch.linalg.eigvalsh(root @ other.T.cov() @ root).clamp_min(0).sqrt().sum()
    spread = one.T.cov().trace() + other.T.cov().trace() - 2 * mixed
    return max(0.0, float((one.mean(0) - other.mean(0)).square().sum() + spread))


def square_root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric matrix whose eigenvalues are negative only by rounding."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T
