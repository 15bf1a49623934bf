"""Random transforms: what an example becomes depends on seed, epoch and example, and on nobody who reads it."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import ROOT, Processes
from safetensors.torch import load_file

from nndist.data.feed import Feed
from nndist.data.randomness import Generators
from nndist.data.sets import Data, Streamed
from nndist.errors import UserError
from nndist.recipe.loading import load_recipe

RECIPE = ROOT / "tests/workers/transformed.py"
MODULE = sys.modules[load_recipe(RECIPE).__module__]
MODULES_OWN, Photographs = MODULE.MODULES_OWN, MODULE.Photographs
CPU = torch.device("cpu")


def by_example(examples, *, world_size=1, epoch=1, start=0, accumulate=1, seed=4, count=None):
    """Example number -> what it was read as, over all processes, from batch `start` of an epoch on."""
    found = {}
    for rank in range(world_size):
        feed = Feed(examples, batch_size=8, seed=seed, rank=rank, world_size=world_size, accumulate=accumulate)
        for batch in feed.epoch(epoch, start):
            for micro in batch.micro_batches:
                found |= dict(zip(micro.numbers[: micro.size].tolist(), micro.raw[0], strict=False))
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    different = [number for number in found if not torch.equal(found[number], expected[number])]
    assert not different, f"examples {different} of {len(found)} are read as something else"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """torchvision's own reader of folders, with the transforms that most people use."""
    from PIL import Image
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    root = tmp_path_factory.mktemp("photographs")
    for number in range(27):
        folder = root / f"class{number % 3}"
        folder.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    steps = [transforms.RandomResizedCrop(8), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    return ImageFolder(str(root), transform=transforms.Compose(steps))


@pytest.mark.parametrize("num_workers, world_size, accumulate", [(0, 3, 2), (1, 1, 1), (3, 1, 1), (3, 2, 1)])
@pytest.mark.parametrize("kind", ["folder", "every generator"])
def test_workers_and_processes_change_nothing(photographs, kind, num_workers, world_size, accumulate):
    dataset = photographs if kind == "folder" else Photographs(27)
    expected = by_example(Streamed(dataset, 0))
    assert len(expected) == 27
    found = by_example(Streamed(dataset, num_workers), world_size=world_size, accumulate=accumulate)
    assert_same(found, expected)


def test_an_epoch_that_is_begun_in_the_middle(photographs):
    for dataset in (photographs, Photographs(27)):
        expected = by_example(Streamed(dataset, 0))
        for num_workers in (0, 2):
            found = by_example(Streamed(dataset, num_workers), start=2)
            assert len(found) == 27 - 16
            assert_same(found, {number: expected[number] for number in found})


def test_each_epoch_and_each_seed_draws_anew(photographs):
    for dataset in (photographs, Photographs(27)):
        first = by_example(Streamed(dataset, 0))
        for other in (by_example(Streamed(dataset, 0), epoch=2), by_example(Streamed(dataset, 0), seed=5)):
            assert sum(torch.equal(first[number], other[number]) for number in first) < 3


def test_each_example_draws_its_own():
    """Of two examples alike one must not become what the other does."""

    class Noise(torch.utils.data.Dataset):
        def __init__(self):
            self.own, self.another = random.Random(0), random.Random(0)

        def __len__(self):
            return 500

        def __getitem__(self, number):
            ours = [self.own.random(), self.another.random(), random.random(), np.random.random()]
            return torch.tensor([*ours, torch.rand(()).item()], dtype=torch.float64)

    drawn = torch.stack(list(by_example(Streamed(Noise(), 0)).values()))
    assert drawn.flatten().unique().numel() == drawn.numel(), "nor one generator what another gives"
    correlation = torch.corrcoef(torch.cat([drawn[1:].T, drawn[:-1].T]))
    assert (correlation - torch.eye(10)).abs().max() < 0.23  # 5 standard deviations


def states():
    return [
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        MODULES_OWN.getstate(),
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_generators_of_the_training_do_not_move(num_workers):
    """Dropout must not depend on who reads the examples."""
    dataset = Photographs(27)
    before, own = states(), dataset.generator.get_state()
    by_example(Streamed(dataset, num_workers))
    next(Streamed(dataset, num_workers).batches([torch.arange(5)]))
    assert states() == before and torch.equal(dataset.generator.get_state(), own)


def test_an_evaluation_is_the_same_each_time_and_on_any_number_of_processes():
    for num_workers in (0, 2):
        examples = Streamed(Photographs(20), num_workers)
        whole, _ = next(examples.batches([torch.arange(20)]))
        parts = [pictures for pictures, _ in examples.batches(torch.arange(20).split(7))]
        assert torch.equal(torch.cat(parts), whole)
        data = Data(examples, examples)
        assert torch.equal(data.inputs(data.test, 3, 9)[0], whole[3:9])
    assert not torch.equal(whole[0], by_example(examples)[0])


def test_a_random_collate_is_exact_in_a_resume():
    def mix(examples):
        pictures, labels = torch.stack([e[0] for e in examples]), torch.tensor([e[1] for e in examples])
        share = np.random.beta(1, 1)
        return share * pictures + (1 - share) * pictures[torch.randperm(len(pictures))], labels

    expected = by_example(Streamed(Photographs(27), 0, collate=mix))
    assert sum(torch.equal(expected[n], p) for n, p in by_example(Streamed(Photographs(27), 0)).items()) < 3
    for num_workers in (0, 2):
        found = by_example(Streamed(Photographs(27), num_workers, collate=mix), start=1)
        assert_same(found, {number: expected[number] for number in found})


def test_what_a_collate_draws_belongs_to_its_first_example():
    examples = Streamed(Photographs(27), 0, collate=lambda given: torch.rand(())).in_epoch(4, 1)
    one, again, other = examples.batches([torch.tensor(numbers) for numbers in ([3, 5, 7], [3, 5, 9], [4, 5, 7])])
    assert one == again != other


class Lazy(torch.utils.data.Dataset):
    """Makes its generator when it is first read, as many do so that each worker has one."""

    generator = None

    def __len__(self):
        return 27

    def __getitem__(self, number):
        if self.generator is None:
            self.generator = np.random.default_rng()
        return torch.tensor([number, self.generator.random()])


def test_a_generator_that_is_made_while_reading():
    expected = by_example(Streamed(Lazy(), 0))
    for num_workers in (0, 2, 3):
        assert_same(by_example(Streamed(Lazy(), num_workers)), expected)


MODULES_TOO = np.random.RandomState(3)


def test_generators_are_found_wherever_a_dataset_has_them():
    hidden, bits = random.Random(1), np.random.PCG64(1)

    def transform(value, drawn=torch.Generator()):  # noqa: B008
        return value + hidden.random() + MODULES_TOO.rand() + torch.rand((), generator=drawn)

    class Slotted:
        __slots__ = ("bits",)
        shared = random.Random(2)

    class Holder:
        pass

    slotted, holder = Slotted(), Holder()
    slotted.bits = bits
    holder.transforms = [{"a": (transform, slotted)}]
    holder.loop = holder
    found = {id(generator) for _, generator in Generators(dataset=holder)._found}
    wanted = [hidden, bits, MODULES_TOO, transform.__defaults__[0], Slotted.shared]
    assert {id(generator) for generator in wanted} <= found


def test_a_generator_that_can_not_be_seeded_is_one_line():
    dataset = Photographs(9)
    dataset.transform.transforms[-1].own = random.SystemRandom()
    with pytest.raises(UserError, match=r"^dataset\.transform\.transforms\[2\]\.own: a random\.SystemRandom can't"):
        list(Streamed(dataset, 0).batches([torch.arange(2)]))


class Run:
    """A training of tests/workers/transformed.py in a folder of its own, launched as often as it takes."""

    def __init__(self, folder: Path, *flags, world_size=1):
        folder.mkdir()
        self.folder, self.world_size = folder, world_size
        self.flags = ["--runs-dir", folder, "--run", "it", "--no-progress", "--no-figures", "--threads", 1]
        self.flags += ["--timeout-seconds", 20, "--save-every", "5 steps", "--evaluate-every", "4 steps", *flags]

    def launch(self, fault=""):
        launched = Processes(self.world_size, [RECIPE, *self.flags], env={"FAULT": fault}, folder=self.folder)
        assert any(launched.wait()) == bool(fault), launched.said()
        return self

    @property
    def saved(self):
        newest = max((self.folder / "transformed/it/checkpoints").glob("step-*"))
        assert newest.name == "step-00000021"
        return [(newest / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer", "random")]

    @property
    def weights(self):
        newest = max((self.folder / "transformed/it/checkpoints").glob("step-*"))
        return load_file(newest / "model.safetensors")["2.weight"]

    @property
    def scores(self):
        lines = (self.folder / "transformed/it/metrics.jsonl").read_text().splitlines()
        return [line["test/loss"] for line in map(json.loads, lines) if "test/loss" in line]


def test_a_training_that_is_killed_goes_on_with_the_same_bits(tmp_path):
    whole = Run(tmp_path / "whole", "--num-workers", 0).launch()
    assert len(whole.scores) == 6 and len(set(whole.scores)) > 1
    for num_workers in (0, 2):
        killed = Run(tmp_path / f"killed{num_workers}", "--num-workers", num_workers)
        killed.launch("0 9 kill").launch("0 7 kill").launch()
        assert killed.saved == whole.saved and killed.scores == whole.scores


def test_a_training_on_three_processes_sees_the_same(tmp_path):
    alone = Run(tmp_path / "1", "--num-workers", 0, "--dropout", 0.0).launch()
    three = Run(tmp_path / "3", "--num-workers", 1, "--dropout", 0.0, world_size=3).launch()
    assert (three.weights - alone.weights).abs().max() < 1e-5 * alone.weights.abs().max()
    assert three.scores == pytest.approx(alone.scores, rel=1e-5)
