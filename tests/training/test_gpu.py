"""What is claimed of a GPU, in under two minutes: `pytest -m gpu`. NNDIST_TEST_DEVICE=cpu rehearses it on a CPU.

No GPU has run it yet. tests/benchmarks/gpu.py measures; tests/benchmarks/gpu_session.py does both.
"""

import os

import numpy as np
import pytest
import torch
from launching import ROOT
from making import path_of
from safetensors.torch import load_file
from toys import Line

import nndist
from nndist.data.sets import Streamed
from nndist.data.transfer import SideStream, copier, delivered
from nndist.data.transforms import per_example
from nndist.distributed.runtime import Runtime
from nndist.recipe.loading import load_recipe
from nndist.training.trainer import Trainer

DEVICE = torch.device(os.environ.get("NNDIST_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
NO_GPU = ON_GPU and not torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU, reason="needs a CUDA GPU; see the docstring")]
FAMILIES = ("mnist_cnn", "mnist_rnn", "mnist_gan", "char_gpt")
only_on_gpu = pytest.mark.skipif(not ON_GPU, reason="a CPU has nothing of the kind")


@pytest.fixture
def train(tmp_path):
    """nndist.train on the device, quietly, by default of 12 steps without an evaluation on the way."""

    def call(recipe, **settings):
        made = {"runs_dir": tmp_path, "run": "it", "progress": False, "figures": False, "report": False, "threads": 1}
        made |= {"device": DEVICE.type, "max_steps": 12, "data_source": "sample", "wandb": "off"}
        recipe = path_of(recipe) if isinstance(recipe, str) else recipe
        return nndist.train(recipe, **{**made, **settings})

    return call


def saved(result):
    """Every tensor of the newest checkpoint: weights, optimizer, random generators."""
    folder = max((result.folder / "checkpoints").glob("step-*"))
    return {f"{path.stem}/{n}": t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("recipe", FAMILIES)
def test_a_resume_has_the_same_bits_under_deterministic(train, recipe, monkeypatch):
    monkeypatch.setattr(Trainer, "evaluate", lambda trainer, **_: trainer.log())  # which would take most of the time
    whole = train(recipe, run="whole", deterministic=True)
    train(recipe, run="halves", deterministic=True, max_steps=7)
    assert_same_bits(saved(train(recipe, run="halves", deterministic=True)), saved(whole))


@only_on_gpu
def test_everything_lies_on_the_gpu(train):
    result = train("mnist_gan", max_steps=3)
    assert all(t.device.type == "cuda" for net in result.networks.values() for t in net.state_dict().values())


def test_it_is_the_training_of_a_cpu_up_to_rounding(train):
    ours, theirs = train(Line(dropout=0.0), run="ours"), train(Line(dropout=0.0), run="theirs", device="cpu")
    for name, tensor in saved(theirs).items():
        if name.startswith("model/"):
            torch.testing.assert_close(saved(ours)[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_run_moves_between_devices(train, capsys):
    train(Line(), max_steps=7)
    train(Line(), device="cpu")
    said = capsys.readouterr().out
    assert not ON_GPU or "device cuda before, cpu now: bits may differ" in said
    run = nndist.load_run(train(Line(), max_steps=14).folder)
    assert run.predict([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=only_on_gpu)])
def test_mixed_precision_learns_and_resumes(train, precision):
    settings = {"precision": precision, "deterministic": True, "max_steps": 40, "lr": 0.1}
    whole = train("mnist_simple_cnn", run="whole", **settings)
    losses = whole.history.series("train/loss")[1]
    assert losses[-1] < 0.8 * losses[0]
    assert all(t.dtype == torch.float32 for t in whole.networks["model"].parameters())
    train("mnist_simple_cnn", run="halves", **{**settings, "max_steps": 21})
    assert_same_bits(saved(train("mnist_simple_cnn", run="halves", **settings)), saved(whole))


@only_on_gpu
def test_settings_of_kernels():
    for tf32 in (True, False):
        runtime = Runtime(tf32=tf32, cudnn_benchmark=True)
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (tf32, tf32)
        assert torch.backends.cudnn.benchmark and ("TF32" in runtime.describe()) == tf32
    assert not Runtime(cudnn_benchmark=True, deterministic=True).cudnn_benchmark
    assert not torch.backends.cudnn.benchmark
    Runtime()


@pytest.mark.parametrize("channels_last", ["on", "off"])
def test_channels_last(train, channels_last):
    loss = train("mnist_simple_cnn", channels_last=channels_last).history.series("train/loss")[1]
    other = train("mnist_simple_cnn", run="other", channels_last="off", device="cpu").history.series("train/loss")[1]
    assert loss == pytest.approx(other, rel=0.05)


def test_compiled_training_resumes_with_the_same_bits(train):
    settings = {"compile": True, "deterministic": True}
    whole = train(Line(dropout=0.3), run="whole", **settings)
    train(Line(dropout=0.3), run="halves", max_steps=8, **settings)
    assert_same_bits(saved(train(Line(dropout=0.3), run="halves", **settings)), saved(whole))


class Rows(torch.utils.data.Dataset):
    """Example i is 50,000 times i."""

    def __len__(self):
        return 400

    def __getitem__(self, number):
        return torch.full((50_000,), float(number))


def test_prefetched_batches_hold_what_was_read():
    """While long kernels read a batch, the next ones are copied into memory that earlier ones have given back."""
    assert not ON_GPU or type(copier(DEVICE, 2)) is SideStream
    indices = torch.arange(400).split(8)
    sums = []
    for (batch,) in Streamed(Rows(), 2).to(DEVICE).batches(indices):
        for _ in range(20):
            work = batch @ batch.T  # keeps the device busy
        sums.append((batch.sum(1), work.sum()))
        del batch, work
    found = torch.cat([rows for rows, _ in sums]).cpu()
    assert torch.equal(found, 50_000 * torch.arange(400.0))


@only_on_gpu
def test_a_copy_overlaps_with_the_step_before():
    """Ten copies of 128 MB beside ten products take less than one after the other."""
    batches = [torch.ones(32_000_000, pin_memory=True) for _ in range(10)]
    matrix = torch.rand(6000, 6000, device=DEVICE)

    def seconds(copied):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        began.record()
        for batch in delivered(iter(batches), copied):
            (matrix @ matrix).add_(batch[0])
        ended.record()
        torch.cuda.synchronize()
        return began.elapsed_time(ended) / 1e3

    seconds(copier(DEVICE, 1))
    one_by_one, beside = (min(seconds(copier(DEVICE, n)) for _ in range(3)) for n in (0, 1))
    assert beside < 0.95 * one_by_one


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """24 JPEG files to train on, and 8 to test."""
    from PIL import Image

    root = tmp_path_factory.mktemp("photographs")
    y, x = np.mgrid[0:90, 0:120]
    for number in range(32):
        folder = root / ("train" if number < 24 else "val") / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        planes = [128 + 100 * np.sin(x / 9 + y / 11 + plane + number) for plane in range(3)]
        Image.fromarray(np.stack(planes, 2).astype(np.uint8)).save(folder / f"{number}.JPEG", quality=95)
    return root


def test_photographs_decoded_on_the_device_are_those_of_the_workers(photographs):
    from nndist.data.config import DataConfig
    from nndist.datasets.imagenet import imagenet

    config = DataConfig(directory=photographs, source="auto", download=False, progress=False, num_workers=2)
    views = []
    for place in ("workers", "device"):
        data = imagenet(config, images=photographs, shards=None, side=32, window=1, decode_on=place).to(DEVICE)
        views.append([raw for raw in data.train.in_epoch(0, 0).batches(torch.arange(24).split(5))])
    for (images, labels), (others, other_labels) in zip(*views, strict=True):
        assert others.device.type == DEVICE.type and torch.equal(labels, other_labels)
        assert (images.float() - others.float()).abs().mean() < 2.5


def test_an_image_network_trains_on_photographs_decoded_on_the_device(train, photographs):
    recipe = load_recipe(ROOT / "recipes/imagenet_resnet.py")
    made = {"images": photographs, "decode_on": "device", "side": 32, "batch_size": 8, "epochs": 2}
    settings = {"deterministic": True, "max_steps": 4, "num_workers": 2, "data_source": "auto"}
    whole = train(recipe(**made), run="whole", **settings)
    train(recipe(**made), run="halves", **{**settings, "max_steps": 2})
    halves = train(recipe(**made), run="halves", **settings)
    assert not ON_GPU or whole.networks["model"].conv1.weight.device.type == "cuda"
    # nvJPEG need not give the same bits twice; if it does, the resume is exact
    for name, tensor in saved(whole).items():
        if name.startswith("model/") and tensor.is_floating_point():
            torch.testing.assert_close(saved(halves)[name], tensor, rtol=1e-3, atol=1e-3)


def test_transforms_draw_the_same_on_any_device():
    from torchvision.transforms import v2

    from nndist.data.sets import ExampleRandom

    augment = per_example(v2.Compose([v2.RandomResizedCrop(8, antialias=True), v2.RandomHorizontalFlip()]))
    images, labels = torch.rand(6, 3, 20, 24), torch.arange(6)
    numbers = torch.tensor([5, 3, 9, 11, 0, 2])
    ours, theirs = (
        augment((images.to(place), labels), ExampleRandom(1, 2, numbers.to(place)))[0].cpu()
        for place in (DEVICE, "cpu")
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
