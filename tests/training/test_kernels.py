"""Settings that choose a device's kernels: what they set, what a resume under others says, what stays the same."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from toys import Line

import nndist
from nndist.data.sets import Data, ExampleRandom, Resident, Streamed
from nndist.data.transforms import per_example
from nndist.distributed.runtime import Runtime
from nndist.training.resume import other_kernels


@pytest.fixture
def train(tmp_path):
    """nndist.train into a folder of the test, quietly."""

    def call(recipe, **settings):
        made = {"runs_dir": tmp_path, "run": "it", "progress": False, "figures": False, "threads": 1, "max_steps": 3}
        return nndist.train(recipe, wandb="off", report=False, **{**made, **settings})

    return call


@dataclass(kw_only=True)
class Images(Line):
    """A convolution and a linear layer; `flatten` says how one gets to the other."""

    flatten: str = "flatten"

    def data(self, config):
        images = torch.rand(40, 3, 6, 6, generator=torch.Generator().manual_seed(0))
        return Data(
            train=Resident(images, images.mean((1, 2, 3)).unsqueeze(1)), test=Resident(images, images[:, :1, 0, 0])
        )

    def networks(self):
        way = self.flatten

        class Network(nn.Module):
            def __init__(self):
                super().__init__()
                self.convolution, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(128, 1)

            def forward(self, x):
                x = self.convolution(x)
                self.layout = x.is_contiguous(memory_format=torch.channels_last)
                return self.linear(x.view(len(x), -1) if way == "view" else x.flatten(1))

        return {"model": Network()}


@pytest.mark.parametrize("by_recipe", [False, True])
@pytest.mark.parametrize("asked", ["recipe", "on", "off"])
def test_the_layout_is_the_recipes_or_the_one_asked_for(train, by_recipe, asked):
    class Wanting(Images):
        channels_last = by_recipe

    result = train(Wanting(), channels_last=asked)
    wanted = by_recipe if asked == "recipe" else asked == "on"
    network = result.networks["model"]
    assert network.convolution.weight.is_contiguous(memory_format=torch.channels_last) is wanted
    assert network.layout is wanted, "the network's images follow"
    assert network.convolution.weight.shape == (8, 3, 3, 3)


def test_the_layout_changes_rounding_and_nothing_else(train):
    weights = [
        train(Images(), run=asked, channels_last=asked).networks["model"].state_dict() for asked in ("on", "off")
    ]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-4, atol=1e-6)


def test_view_of_an_image_is_one_line_with_a_remedy(train):
    train(Images(flatten="view"), run="plain")
    with pytest.raises(
        nndist.UserError, match=r"view\(\) fails on an image tensor.* \(.*test_kernels.py, line .*--channels-last off"
    ):
        train(Images(flatten="view"), channels_last="on")


def test_an_evaluation_has_the_layout_of_the_training(train, monkeypatch):
    folder = train(Images(), channels_last="on").folder
    assert nndist.load_run(folder, trust=True).config().channels_last == "on"
    about = json.loads((folder / "run.json").read_text())
    assert about["settings"]["channels_last"] == "on" and about["settings"]["cudnn_benchmark"] is True


def test_a_resume_with_another_layout_is_told(train, capsys):
    train(Images(), max_steps=1)
    assert "bits may differ" not in capsys.readouterr().out
    train(Images(), max_steps=2)
    assert "bits may differ" not in capsys.readouterr().out
    train(Images(), channels_last="on")
    assert "channels-last off before, on now: bits may differ" in capsys.readouterr().out


def test_cudnn_times_its_kernels_unless_they_must_repeat_their_bits(train):
    seen = []

    class Asking(Images):
        def after_step(self, networks, step):
            seen.append(torch.backends.cudnn.benchmark)

    for number, settings in enumerate([{}, {"deterministic": True}, {"cudnn_benchmark": False}]):
        train(Asking(), run=str(number), max_steps=1, **settings)
    assert seen == [True, False, False]
    Runtime()
    assert not torch.backends.cudnn.benchmark, "and what only uses a run does not"


def test_notes_of_a_resume_on_a_gpu():
    now = {"compile": "off", "channels-last": "off", "device": "cuda", "deterministic": "off", "tf32": "off"}
    only = "on a GPU a resumed run has the bits of an uninterrupted one only under --deterministic"
    assert other_kernels(now, now) == [only]
    assert other_kernels({**now, "deterministic": "on"}, {**now, "deterministic": "on"}) == []
    assert other_kernels({**now, "tf32": "on"}, now) == ["tf32 on before, off now: bits may differ"]
    assert other_kernels({**now, "device": "cpu"}, now) == ["device cpu before, cuda now: bits may differ"]
    assert other_kernels({}, {"device": "cpu", "compile": "on"}) == [], "an earlier version's run says nothing"


def test_transforms_v2_draw_per_example():
    """The same on any number of processes, in any micro-batch; the training's generators stay where they are."""
    from torchvision.transforms import v2

    transform = v2.Compose([v2.RandomResizedCrop(5, antialias=True), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4)])
    augment = per_example(transform)
    images, labels = torch.rand(12, 3, 9, 9), torch.arange(12)
    before = torch.get_rng_state()
    whole, _ = augment((images, labels), ExampleRandom(3, 1, torch.arange(12)))
    assert whole.shape == (12, 3, 5, 5) and torch.equal(torch.get_rng_state(), before)
    for numbers in (torch.tensor([7, 2]), torch.arange(4, 9)):
        part, kept = augment((images[numbers], labels[numbers]), ExampleRandom(3, 1, numbers))
        assert torch.equal(part, whole[numbers]) and torch.equal(kept, labels[numbers])
    other, _ = augment((images, labels), ExampleRandom(3, 2, torch.arange(12)))
    assert not any(map(torch.equal, other, whole)), "each epoch draws anew"
    twins, _ = augment((images[:1].expand(2, -1, -1, -1), labels[:2]), ExampleRandom(3, 1, torch.tensor([0, 1])))
    assert not torch.equal(*twins)


def test_transforms_v2_train_and_resume(train):
    from torchvision.transforms import v2

    class Transformed(Images):
        def data(self, config):
            data = super().data(config)
            data.augment = per_example(v2.RandomCrop(6, padding=1))
            return data

    whole = train(Transformed(), run="whole", max_steps=5).networks["model"].state_dict()
    train(Transformed(), run="halves", max_steps=3)
    halves = train(Transformed(), run="halves", max_steps=5).networks["model"].state_dict()
    assert all(torch.equal(tensor, halves[name]) for name, tensor in whole.items())
    with pytest.raises(nndist.UserError, match=r"^per_example: its batches are dicts of a and not"):
        per_example(v2.Identity())({"a": torch.zeros(1)}, ExampleRandom(0, 0, torch.zeros(1, dtype=torch.int64)))


def test_streamed_batches_of_this_process_are_as_before():
    class Squares(torch.utils.data.Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, number):
            return torch.tensor(number * number)

    batches = list(Streamed(Squares(), 0).batches(torch.arange(5).split(2)))
    assert [batch[0].tolist() for batch in batches] == [[0, 1], [4, 9], [16]]
