"""The order of the data is a pure function; every process count sees the same global batches."""

import multiprocessing
import os
import shutil
import time
from dataclasses import dataclass

import pytest
import torch
from launching import Processes, alive
from toys import Line

import nndist
from nndist import machine
from nndist.data.feed import Feed, evaluation_indices, micro_slices
from nndist.data.sets import Data, ExampleRandom, Resident, Streamed, part, permutation
from nndist.errors import UserError

CPU = torch.device("cpu")


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    # a change of these numbers would change every run that is resumed
    assert permutation(10, seed=0, epoch=0).tolist() == [3, 7, 1, 5, 4, 9, 2, 8, 6, 0]
    assert permutation(10, seed=0, epoch=1).tolist() == [2, 3, 8, 5, 9, 0, 6, 7, 1, 4]
    assert permutation(10, seed=1, epoch=0).tolist() == [6, 8, 1, 5, 0, 3, 9, 7, 2, 4]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    permutation(1000, seed=0, epoch=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_shuffle_the_order_is_that_of_the_set():
    assert permutation(5, seed=3, epoch=7, shuffle=False).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("length", [0, 1, 2, 5, 50, 64])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_parts_are_those_of_tensor_split(length, parts):
    numbers = torch.arange(length)
    for index, expected in enumerate(torch.tensor_split(numbers, parts)):
        start, stop = part(length, index, parts)
        assert numbers[start:stop].equal(expected)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 50, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("accumulate", [1, 2, 5, 100])
def test_micro_batches_cover_the_global_batch_once(length, world_size, accumulate):
    slices = [micro_slices(length, rank, world_size, accumulate) for rank in range(world_size)]
    assert len({len(s) for s in slices}) == 1, "each micro-batch is a collective: all processes need equally many"
    covered = [number for s in slices for start, stop in s for number in range(start, stop)]
    assert covered == list(range(length))


@pytest.mark.parametrize("length", [1, 2, 3, 8, 22])
@pytest.mark.parametrize("accumulate", [1, 2, 8, 100])
def test_micro_batches_of_two_at_least(length, accumulate):
    """As BatchNorm needs them on one process; a batch of one is what it is."""
    slices = micro_slices(length, 0, 1, accumulate, 2)
    assert [n for start, stop in slices for n in range(start, stop)] == list(range(length))
    assert length == 1 or all(stop - start >= 2 for start, stop in slices)
    assert len(slices) == max(1, min(accumulate, length // 2))


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_each_example_is_evaluated_once(world_size):
    for count in (0, 1, 2, 1000, 10001):
        seen = [i for r in range(world_size) for b in evaluation_indices(count, 300, r, world_size) for i in b.tolist()]
        assert seen == list(range(count))


def steps_of(examples, *, world_size=1, rank=0, accumulate=1, batch_size=8, epoch=2, start=0):
    """What one process is fed in an epoch: (global size, [(numbers, counted)])."""
    feed = Feed(examples, batch_size=batch_size, seed=4, rank=rank, world_size=world_size, accumulate=accumulate)
    return [
        (batch.size, [(micro.raw[0].flatten().tolist(), micro.size) for micro in batch.micro_batches])
        for batch in feed.epoch(epoch, start)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_process_count_sees_the_same_batches(world_size, accumulate):
    examples = Resident(torch.arange(27))  # the last batch has 3 examples
    order = permutation(27, seed=4, epoch=2).tolist()
    fed = [steps_of(examples, world_size=world_size, rank=r, accumulate=accumulate) for r in range(world_size)]
    assert [size for size, _ in fed[0]] == [8, 8, 8, 3]
    for index, expected in enumerate([order[0:8], order[8:16], order[16:24], order[24:27]]):
        counted = [n for process in fed for numbers, size in process[index][1] if size for n in numbers]
        assert counted == expected


def test_a_process_without_examples_gets_one_that_does_not_count():
    examples = Resident(torch.arange(10))
    fed = [steps_of(examples, world_size=3, rank=rank, batch_size=8)[-1] for rank in range(3)]
    assert [micros[0][1] for _, micros in fed] == [1, 1, 0]
    assert len(fed[2][1][0][0]) == 1


def test_an_epoch_can_start_at_any_batch():
    examples = Resident(torch.arange(27))
    assert steps_of(examples, start=2) == steps_of(examples)[2:]


def test_more_processes_than_a_batch_has_examples_is_the_users_error():
    with pytest.raises(UserError, match="--batch-size 2: smaller than the 3 processes"):
        Feed(Resident(torch.arange(9)), batch_size=2, seed=0, world_size=3)


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_last_batch_can_be_left_out(world_size):
    examples = Resident(torch.arange(27))
    order = permutation(27, seed=4, epoch=2).tolist()
    fed = []
    for rank in range(world_size):
        feed = Feed(examples, batch_size=8, seed=4, rank=rank, world_size=world_size, drop_last=True)
        assert feed.steps_per_epoch == 3
        fed.append([micro.raw[0].tolist() for batch in feed.epoch(2) for micro in batch.micro_batches])
    steps = [[number for share in step for number in share] for step in zip(*fed, strict=True)]
    assert steps == [order[n : n + 8] for n in (0, 8, 16)]
    assert Feed(Resident(torch.arange(24)), batch_size=8, seed=4, drop_last=True).steps_per_epoch == 3
    with pytest.raises(
        UserError, match=r"--drop-last: leaves no batch, .* 27 examples .* give --batch-size 27 or less"
    ):
        Feed(examples, batch_size=28, seed=4, drop_last=True)


def test_a_training_set_without_examples_is_the_users_error():
    with pytest.raises(UserError, match="the training set has 0 examples"):
        Feed(Resident(torch.zeros(0, 3)), batch_size=8, seed=0)


@dataclass(kw_only=True)
class Sized(Line):
    """So many examples in each set."""

    train: int = 20
    test: int = 5
    other: int = 5

    def data(self, config):
        sets = [Resident(torch.zeros(n, 4), torch.zeros(n, 1)) for n in (self.train, self.test, self.other)]
        return Data(*sets[:2], more={"other": sets[2]})


@pytest.mark.parametrize("name, text", [("train", "training"), ("test", "test"), ("other", "other")])
def test_a_set_without_examples_is_named_before_the_first_step(tmp_path, name, text):
    with pytest.raises(UserError, match=rf": the {text} set has 0 examples; data\(\) must return at least one"):
        nndist.train(Sized(**{name: 0}), runs_dir=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_training_without_the_last_batch(tmp_path):
    recipe = Sized(drop_last=True, epochs=2)
    result = nndist.train(recipe, runs_dir=tmp_path, progress=False, report=False, figures=False)
    assert result.steps == 2 and recipe.batch_size == 16


OTHER_EXAMPLES = """
import os, torch
from toys import Line
from nndist import Data, Resident
from dataclasses import dataclass

@dataclass(kw_only=True)
class Different(Line):
    def data(self, config):
        x, y = torch.zeros(20, 4), torch.full((20, 4), float(os.environ["RANK"]))
        return Data(Resident(TRAIN, TRAIN[:, :1]), Resident(TEST[:5], TEST[:5, :1]))
"""


@pytest.mark.parametrize("which", ["training", "test"])
def test_processes_with_other_examples_are_told_before_the_first_step(tmp_path, which):
    recipe = tmp_path / "different.py"
    train, test = ("y", "x") if which == "training" else ("x", "y")
    recipe.write_text(OTHER_EXAMPLES.replace("TRAIN", train).replace("TEST", test))
    launched = Processes(2, [recipe, "--runs-dir", tmp_path / "runs", "--no-progress"], folder=tmp_path)
    assert launched.wait()[0] == 2
    (line,) = [line for line in launched.said().splitlines() if line.startswith("error:")]
    assert f"process 1 has as many {which} examples as process 0, but different ones; put the same files" in line
    assert not (tmp_path / "runs").exists()


def test_the_tensors_of_a_set_must_be_equally_long():
    with pytest.raises(ValueError, match="the same number of examples"):
        Resident(torch.zeros(3), torch.zeros(4))


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """27 images on disk, as torchvision's ImageFolder reads them, the number of each in its pixels."""
    from PIL import Image
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import pil_to_tensor

    root = tmp_path_factory.mktemp("images")
    for number in range(27):
        folder = root / f"class{number % 3}"
        folder.mkdir(exist_ok=True)
        Image.new("L", (4, 4), number).save(folder / f"{number:03d}.png")
    return ImageFolder(str(root), transform=lambda image: pil_to_tensor(image)[0, 0, 0])


def test_a_folder_of_images_is_known_by_its_files(image_folder, tmp_path):
    root = shutil.copytree(image_folder.root, tmp_path / "elsewhere")
    known = Streamed(image_folder).fingerprint()
    assert len(known) == 8 and Streamed(type(image_folder)(root)).fingerprint() == known
    (root / "class0/000.png").rename(root / "class1/000.png")
    assert Streamed(type(image_folder)(root)).fingerprint() not in ("", known)
    assert Streamed([1, 2, 3]).fingerprint() not in ("", known), "by the examples"


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size, accumulate", [(1, 1), (3, 2)])
def test_images_in_a_folder_come_in_the_same_order_as_from_memory(image_folder, num_workers, world_size, accumulate):
    resident = Resident(torch.stack([image_folder[i][0] for i in range(27)]))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for rank in range(world_size):
        place = {"world_size": world_size, "rank": rank, "accumulate": accumulate, "start": 1}
        assert steps_of(Streamed(image_folder, num_workers), **place) == steps_of(resident, **place)
    assert torch.equal(torch.get_rng_state(), state), "loading must not draw from the generator that dropout uses"


def test_an_examples_random_numbers_are_a_pure_function():
    numbers = torch.arange(1000)
    first = ExampleRandom(3, 5, numbers)
    one, two = first.uniform(2), first.uniform()
    again = ExampleRandom(3, 5, numbers[[17, 400]])
    assert torch.equal(again.uniform(2), one[[17, 400]]) and torch.equal(again.uniform(), two[[17, 400]])
    for seed, epoch in ((4, 5), (3, 6)):
        assert not torch.equal(ExampleRandom(seed, epoch, numbers).uniform(2), one)


def test_an_examples_random_numbers_are_uniform_and_independent():
    values = ExampleRandom(0, 0, torch.arange(200_000)).uniform(3)
    assert values.dtype == torch.float32 and values.min() >= 0 and values.max() < 1
    counts = torch.histc(values, bins=100, min=0, max=1)
    expected = values.numel() / 100
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert 50 < chi_squared < 170  # 99 degrees of freedom: 1 in 10,000 lies outside on either side
    neighbours = torch.stack([values[:-1, 0], values[1:, 0], values[:-1, 1], values[:-1, 2]])
    correlation = torch.corrcoef(neighbours) - torch.eye(4)
    assert correlation.abs().max() < 0.012  # 5 standard deviations


def test_an_examples_normal_numbers_are_normal():
    values = ExampleRandom(0, 0, torch.arange(200_000)).normal(2)
    assert values.dtype == torch.float32 and values.isfinite().all()
    expected = torch.erf(torch.tensor([0.5, 1.0, 2.0, 3.0]) / 2**0.5)  # how many lie within so many deviations
    found = torch.stack([(values.abs() < reach).float().mean() for reach in (0.5, 1.0, 2.0, 3.0)])
    assert (found - expected).abs().max() < 0.004  # 5 standard deviations of such a share
    assert abs(torch.corrcoef(values.T)[0, 1]) < 0.012
    assert abs(values.mean()) < 0.008


class Hanging:
    """A dataset whose second example never comes; it writes down which process waits for it."""

    def __init__(self, folder):
        self.folder = folder

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if index == 1:
            (self.folder / f"{os.getpid()}").touch()
            time.sleep(600)
        return (torch.zeros(1),)


def _read_hanging(folder):
    list(Streamed(Hanging(folder), num_workers=1).batches([torch.tensor([0]), torch.tensor([1])]))


def test_a_loader_that_hangs_does_not_outlive_a_killed_training(tmp_path):
    reader = multiprocessing.get_context("fork").Process(target=_read_hanging, args=(tmp_path,))
    reader.start()

    def wait_for(condition):
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    wait_for(lambda: any(tmp_path.iterdir()))
    (loader,) = [int(path.name) for path in tmp_path.iterdir()]
    assert alive(loader) and loader != reader.pid
    reader.kill()
    reader.join()
    try:
        wait_for(lambda: not alive(loader))
    finally:
        machine.kill(loader)
