"""Real MNIST: a recipe takes the steps of its document's script, written in plain PyTorch, and reaches what it reaches.

The plain scripts below use nothing of nndist: torchvision reads the files, the loss is a mean.
"""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn, optim

import nndist
from nndist.data.sets import Resident
from nndist.distributed.runtime import Runtime
from nndist.recipe.loading import load_recipe

NUM_TEST = 2000  # test images that are read in float64, which is slow


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


@dataclass(frozen=True)
class Case:
    """A document's script; and how long it is followed: over so many steps in float64, and over `short` in fp32."""

    network: type
    batch_size: int
    mean: float
    std: float
    optimizer: type
    lr: float
    steps: int
    short: int
    tolerance: float


CASES = {
    "mnist_simple_cnn": Case(SimpleCNN, 64, 0.1307, 0.3081, optim.SGD, 0.01, 60, 300, 0.05),
    "mnist_cnn_pool": Case(CNNPool, 50, 0.0, 1.0, optim.Adam, 0.01, 60, 240, 0.03),
    "mnist_mlp": Case(ThreeNet, 256, 0.5, 0.5, optim.SGD, 0.01, 300, 940, 0.02),
}


@pytest.fixture(scope="module")
def normalised(mnist_dir):
    """By mean and deviation: MNIST as torchvision reads it, images and labels, training and test."""
    from torchvision.datasets import MNIST

    torch.set_num_threads(1)
    sets = [MNIST(root=str(mnist_dir), train=train) for train in (True, False)]
    return lambda mean, std: [(((s.data / 255).unsqueeze(1) - mean) / std, s.targets) for s in sets]


def plain_script(name, normalised, seed, order, dtype, num_test=10_000):
    """The network that the document's script trains on batches of these examples, and its right answers of the test.

    It begins with the weights that the recipe draws with this seed; `num_test` images are tested.
    """
    case = CASES[name]
    Runtime(threads=1).seed(seed)
    initial = load_recipe(ROOT / f"recipes/{name}.py")().networks()["model"]
    network = case.network().to(dtype)
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), initial.parameters(), strict=True):
            parameter.copy_(value)
    optimizer = case.optimizer(network.parameters(), lr=case.lr)
    (images, labels), (test_images, test_labels) = normalised(case.mean, case.std)
    for batch in order:
        optimizer.zero_grad()
        F.cross_entropy(network(images[batch].to(dtype)), labels[batch]).backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        predicted = torch.cat([network(x.to(dtype)).argmax(1) for x in test_images[:num_test].split(500)])
    return network, int((predicted == test_labels[:num_test]).sum())


def in_float64(name, normalised):
    """The recipe in float64, so that rounding can't hide or make a difference; `seen` has each step's examples."""
    case = CASES[name]

    @dataclass(kw_only=True)
    class Watched(load_recipe(ROOT / f"recipes/{name}.py")):
        seen: ClassVar[list] = []

        def data(self, config):
            """All images and labels must be the script's; training goes on with these, as fp32 normalises to 1e-7."""
            data = super().data(config)
            sets = []
            for examples, expected in zip((data.train, data.test), normalised(case.mean, case.std), strict=True):
                images, labels, *rest = data.inputs(examples)
                torch.testing.assert_close(images.view_as(expected[0]), expected[0], atol=2e-6, rtol=0)
                assert torch.equal(labels, expected[1])
                sets.append((expected[0].view_as(images), labels, *rest))
            data.train = Resident(*sets[0], torch.arange(60_000))
            data.test = Resident(*(tensor[:NUM_TEST] for tensor in sets[1]))
            data.more = {}
            data.prepare = lambda batch: (batch[0].double(), *batch[1:])
            return data

        def networks(self):
            return {name: network.double() for name, network in super().networks().items()}

        def loss(self, networks, batch):
            self.seen.append(batch[-1].clone())
            return super().loss(networks, batch[:-1])

    return Watched(best=None)


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_the_recipe_takes_the_scripts_steps(name, normalised, mnist_dir, tmp_path):
    """The same weights and the same number of right answers after the same examples, in an order that is shuffled."""
    recipe, case = in_float64(name, normalised), CASES[name]
    settings = {"data_dir": mnist_dir, "data_source": "mnist", "runs_dir": tmp_path, "figures": False, "report": False}
    result = nndist.train(recipe, max_steps=case.steps, seed=3, progress=False, threads=1, **settings)
    order = recipe.seen
    assert [len(batch) for batch in order] == [len(batch) for batch in whole_epochs(case, case.steps)]
    network, right = plain_script(name, normalised, 3, order, torch.float64, NUM_TEST)
    for ours, theirs in zip(result.networks["model"].parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert round(result.scores["test/accuracy"] * NUM_TEST, 6) == right
    taken = torch.cat(order)
    for epoch in taken.split(60_000):
        assert len(epoch.unique()) == len(epoch), "no example twice"
        places = torch.stack([epoch.double(), torch.arange(len(epoch)).double()])
        assert epoch.double().mean().sub(30_000).abs() < 5 * 17_321 / len(epoch) ** 0.5, "from everywhere"
        assert torch.corrcoef(places)[0, 1].abs() < 5 / len(epoch) ** 0.5, "in no order"
    if len(taken) > 60_000:
        assert (taken[60_000:] == taken[: len(taken) - 60_000]).double().mean() < 0.01, "in another one each epoch"


def whole_epochs(case, steps):
    """A shuffled order of the examples, drawn by torch, in as many batches."""
    order = []
    while len(order) < steps:
        order += torch.randperm(60_000).split(case.batch_size)
    return order[:steps]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.nightly
def test_the_recipe_reaches_what_the_script_reaches(name, normalised, mnist_dir, tmp_path, capsys):
    """As it is trained, in fp32; the script shuffles by itself. No whole training: some epochs."""
    case = CASES[name]
    settings = {"data_dir": mnist_dir, "data_source": "mnist", "runs_dir": tmp_path, "figures": False, "report": False}
    settings |= {"evaluate_every": "1000 steps", "progress": False, "threads": 1}
    result = nndist.train(ROOT / f"recipes/{name}.py", max_steps=case.short, seed=0, **settings)
    torch.manual_seed(100)
    _, right = plain_script(name, normalised, 0, whole_epochs(case, case.short), torch.float32)
    ours, theirs = result.scores["test/accuracy"], right / 10_000
    with capsys.disabled():
        print(f"\n{name}, {case.short} steps: nndist {ours:.4f}, plain PyTorch {theirs:.4f}")
    assert abs(ours - theirs) < case.tolerance and ours > 0.8
