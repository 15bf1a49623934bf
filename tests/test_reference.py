"""Real MNIST: a recipe reaches what the document's script, written in plain PyTorch, reaches, within seed noise.

Long. The plain scripts below use nothing of nndist: torchvision reads the files, the loss is a mean.
"""

import statistics

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn, optim

import nndist
from nndist.recipe import load_recipe
from nndist.runtime import Runtime

pytestmark = pytest.mark.long
SEEDS = (0, 1, 2)


class SimpleCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * 5 * 5, 128), nn.ReLU(), nn.Linear(128, 10)),
        )

    def forward(self, x):
        return self.layers(x)


class CNNPool(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 16, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
        )

    def forward(self, x):
        return self.layers(x)


class ThreeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 60), nn.ReLU(), nn.Linear(60, 10)
        )

    def forward(self, x):
        return F.log_softmax(self.layers(x), dim=1)


CASES = {
    "mnist_simple_cnn": (SimpleCNN, 64, 1, 0.1307, 0.3081, lambda p: optim.SGD(p, lr=0.01)),
    "mnist_cnn_pool": (CNNPool, 50, 1, 0.0, 1.0, lambda p: optim.Adam(p, lr=0.01)),
    "mnist_mlp": (ThreeNet, 256, 40, 0.5, 0.5, lambda p: optim.SGD(p, lr=0.01)),
}


@pytest.fixture(scope="module")
def tensors(mnist_dir):
    """MNIST as torchvision reads it: images in [0, 1] and labels, training and test."""
    from torchvision.datasets import MNIST

    sets = [MNIST(root=str(mnist_dir), train=train) for train in (True, False)]
    return [((s.data / 255).unsqueeze(1), s.targets) for s in sets]


def plain_script(name, tensors, seed):
    """Test accuracy of the document's script, from the initial weights that the recipe draws with this seed.

    Over 40 epochs those decide more than the order of the data does; the script's own order is torch's.
    """
    network_class, batch_size, epochs, mean, std, make_optimizer = CASES[name]
    runtime = Runtime()
    runtime.seed(seed)
    initial = load_recipe(ROOT / f"recipes/{name}.py")().networks()["model"]
    network = network_class()
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), initial.parameters(), strict=True):
            parameter.copy_(value)
    torch.manual_seed(seed + 100)
    optimizer = make_optimizer(network.parameters())
    (images, labels), (test_images, test_labels) = [((x - mean) / std, y) for x, y in tensors]
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        predicted = torch.cat([network(x).argmax(1) for x in test_images.split(500)])
    return (predicted == test_labels).float().mean().item()


@pytest.mark.parametrize("name", CASES)
def test_the_recipe_reaches_what_the_script_reaches(name, tensors, mnist_dir, tmp_path, capsys):
    epochs = CASES[name][2]
    settings = {"data_dir": mnist_dir, "data_source": "mnist", "runs_dir": tmp_path, "figures": False}
    recipe = ROOT / f"recipes/{name}.py"
    ours, theirs = [], []
    for seed in SEEDS:
        result = nndist.train(recipe, epochs=epochs, seed=seed, progress=False, **settings)
        ours.append(result.scores["test/accuracy"])
        theirs.append(plain_script(name, tensors, seed))
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    noise = statistics.stdev(differences) / len(differences) ** 0.5
    difference = statistics.mean(differences)
    with capsys.disabled():
        print(f"\n{name}, {epochs} epochs, {len(SEEDS)} seeds: nndist {statistics.mean(ours):.4f}, ", end="")
        print(f"plain PyTorch {statistics.mean(theirs):.4f}, difference {difference:+.4f}, its noise {noise:.4f}")
    assert abs(difference) < 4 * noise + 0.002
