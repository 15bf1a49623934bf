"""Photographs decoded on the device: the same views as those that workers decode, whoever reads them."""

import io

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import nndist
from nndist.data.config import DataConfig
from nndist.data.feed import Feed
from nndist.datasets.imagenet import imagenet, shard_folder
from nndist.errors import UserError
from nndist.recipe.loading import load_recipe

SIZES = [(64, 48), (40, 90), (33, 33), (120, 50)]


def smooth(number, width, height):
    """A photograph without sharp edges, of which resampling filters agree."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [128 + 100 * np.sin(x / (7 + number % 5) + y / 11 + plane + number) for plane in range(3)]
    return Image.fromarray(np.stack(planes, 2).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 photographs to train on, 4 to test, among them a PNG, a grey one and one in CMYK."""
    root = tmp_path_factory.mktemp("photographs")
    for number in range(16):
        place = root / ("train" if number < 12 else "val") / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        image = smooth(number, *SIZES[number % 4])
        mode = {3: "L", 5: "CMYK", 13: "L", 14: "CMYK"}.get(number, "RGB")
        name = f"{number:02d}.{'png' if number in (2, 7) else 'JPEG'}"
        image.convert(mode).save(place / name, quality=95, **({} if name.endswith("png") else {"subsampling": 0}))
    return root


def config(tmp_path, num_workers=0):
    return DataConfig(directory=tmp_path, source="auto", download=False, progress=False, num_workers=num_workers)


def data_of(folder, decode_on, num_workers=0, **places):
    places = {"images": folder, "shards": None, **places}
    return imagenet(config(folder, num_workers), side=24, window=4, decode_on=decode_on, **places)


def by_example(examples, *, world_size=1, accumulate=1, epoch=1, start=0):
    """Example number -> its pixels and class, over all processes."""
    found = {}
    for rank in range(world_size):
        feed = Feed(examples, batch_size=6, seed=4, rank=rank, world_size=world_size, accumulate=accumulate)
        for batch in feed.epoch(epoch, start):
            for micro in batch.micro_batches:
                images, labels = micro.raw
                assert images.dtype == torch.uint8 and images.shape[1:] == (24, 24, 3)
                pairs = zip(images, labels, strict=True)
                found |= dict(zip(micro.numbers[: micro.size].tolist(), pairs, strict=False))
    return found


def evaluated(examples):
    """Example number -> its pixels and class, as an evaluation reads them."""
    numbers = torch.arange(len(examples)).split(3)
    pairs = [zip(*raw, strict=True) for raw in examples.batches(numbers)]
    return dict(enumerate(pair for batch in pairs for pair in batch))


@pytest.mark.parametrize("training", [True, False])
def test_the_device_sees_what_workers_see(folder, training):
    """The same crops, sizes and mirrorings: what remains is the rounding of a decoder and of a filter."""
    sets = [data_of(folder, place) for place in ("workers", "device")]
    views = [by_example(data.train) if training else evaluated(data.test) for data in sets]
    assert views[0].keys() == views[1].keys() and len(views[0]) == (12 if training else 4)
    for number, (image, label) in views[0].items():
        other, other_label = views[1][number]
        assert label == other_label
        assert (image.float() - other.float()).abs().mean() < 1.5, number
        mirrored = image.flip(1).float()
        assert (mirrored - other.float()).abs().mean() > 5, "and a wrong view would be seen"


@pytest.mark.parametrize("num_workers, world_size, accumulate", [(2, 1, 1), (0, 3, 2), (1, 2, 1)])
def test_whoever_reads_them(folder, num_workers, world_size, accumulate):
    expected = by_example(data_of(folder, "device").train)
    found = by_example(data_of(folder, "device", num_workers).train, world_size=world_size, accumulate=accumulate)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[number][0], expected[number][0]) for number in found)


def test_from_the_middle_of_an_epoch_and_from_shards(folder, tmp_path):
    expected = by_example(data_of(folder, "device").train)
    found = by_example(data_of(folder, "device").train, start=1)
    assert len(found) == 6 and all(torch.equal(found[number][0], expected[number][0]) for number in found)
    shard_folder(folder, tmp_path / "shards", shard_bytes=20_000, progress=False)
    shards = {"images": None, "shards": str(tmp_path / "shards")}
    views = [by_example(data_of(folder, place, **shards).train) for place in ("workers", "device")]
    for number, (image, _) in views[0].items():
        assert (image.float() - views[1][number][0].float()).abs().mean() < 1.5


@pytest.mark.parametrize("damage", ["cut", "text"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_file_is_named(folder, tmp_path, damage, num_workers):
    import shutil

    place = tmp_path / "photographs"
    shutil.copytree(folder, place)
    bad = place / "train/class0/04.JPEG"
    data = bad.read_bytes()
    bad.write_bytes(data[: len(data) // 3] if damage == "cut" else b"no photograph")
    with pytest.raises(UserError, match=r"04.JPEG: is not a readable image \(.*\); replace or remove it$"):
        by_example(data_of(place, "device", num_workers).train)


@pytest.mark.long
def test_a_resumed_training_has_the_bits_of_one_that_was_not_stopped(folder, tmp_path):
    recipe = load_recipe(ROOT / "recipes/imagenet_resnet.py")
    settings = {
        "runs_dir": tmp_path,
        "progress": False,
        "figures": False,
        "report": False,
        "wandb": "off",
        "threads": 1,
    }

    def train(run, steps):
        made = recipe(images=folder, decode_on="device", side=16, batch_size=4, epochs=3)
        return nndist.train(made, run=run, max_steps=steps, num_workers=1, **settings)

    train("halves", 4)
    halves, whole = train("halves", 5), train("whole", 5)
    tensors = [result.networks["model"].state_dict() for result in (halves, whole)]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


def test_the_bytes_of_a_batch_are_one_tensor(folder):
    """Each tensor that a worker sends takes an open file of this process."""
    from nndist.datasets.encoded import Photographs

    data = data_of(folder, "device")
    examples = [data.train.decode(data.train.dataset[number], None)[0] for number in range(5)]
    batch = Photographs(examples, 24)
    assert sum(isinstance(value, torch.Tensor) for value in vars(batch).values()) == 1
    assert batch.data.numel() == sum(len(example.data) for example in examples)
    first = Image.open(io.BytesIO(bytes(batch.data[: batch.lengths[0]].tolist())))
    assert first.format == "JPEG"
