"""Every recipe: its network, and the first losses that it has always had.

`python tests/recipes/test_recipes.py` writes the traces anew, after a change that is meant to change them.
"""

import json
import math
import re
from pathlib import Path

import pytest
from conftest import RECIPES, ROOT
from launching import command, succeeded
from making import FEWER, make, train_readers_in, with_few_examples

import nndist
from nndist import figures
from nndist.cli.recipe_list import entries, markdown
from nndist.config import RunConfig
from nndist.recipe.loading import load_recipe
from nndist.runs.records import TIMED

TRACES = Path(__file__).with_name("traces.json")
NUM_STEPS = 10

# network -> (parameters, shape of its output for a batch of 2, its inputs' places in the batch where it is not the
# first); the arithmetic is that of the documents' layers
NETWORKS = {
    "mnist_cnn": {"model": (1 * 32 * 9 + 32 + 32 * 64 * 9 + 64 + 9216 * 128 + 128 + 128 * 10 + 10, (2, 10))},
    "mnist_cnn_pool": {"model": (16 * 25 + 16 + 16 * 32 * 25 + 32 + 32 * 49 * 10 + 10, (2, 10))},
    "mnist_simple_cnn": {"model": (32 * 9 + 32 + 32 * 64 * 9 + 64 + 1600 * 128 + 128 + 128 * 10 + 10, (2, 10))},
    "mnist_mlp": {"model": (784 * 200 + 200 + 200 * 60 + 60 + 60 * 10 + 10, (2, 10))},
    "sum_mlp": {"model": (30 * 60 + 60 + 60 * 60 + 60 + 60 + 1, (2, 1))},
    "sine_regression": {"model": (31, (2, 1))},
    "quadratic_regression": {"model": (31, (2, 1))},
    "two_clusters": {"model": (2 * 10 + 10 + 10 * 2 + 2, (2, 2))},
    "mnist_gan": {
        "discriminator": (16 * 32 + 32 + 16 * 32 * 64 + 64 + 64 * 49 + 1, (2,)),
        "generator": (64 * 64 * 49 + 2 * 64 + 16 * 64 * 32 + 2 * 32 + 16 * 32 + 1, (2, 1, 28, 28), 2),
    },
    "digits_detector": {
        "model": (
            9 * 16 + 9 * 16 * 32 + 9 * 32 * 64 + 2 * 9 * 64 * 64 + 2 * (16 + 32 + 3 * 64) + 65 * 14,
            (2, 14, 12, 12),
        )
    },
    "digits_embedding": {"model": (16 * 25 + 16 + 32 * 16 * 25 + 32 + 32 * 49 * 32 + 32 + 7 * 32, (2, 32))},
    "digits_unet": {
        "model": (
            9 * (12 + 12 * 24 + 24 * 48 + 48 * 48 + 72 * 24 + 36 * 12) + 2 * (12 + 24 + 48 + 48 + 24 + 12) + 109 * 44,
            (2, 11, 48, 48),
        )
    },
    "superres_gan": {
        "discriminator": (16 * 2 * 16 + 16 + 16 * 16 * 32 + 32 + 32 * 49 + 1, (2,), 0, 2),
        "generator": (
            *(9 * 32 + 32 + 9 * 32 * 32 + 32 + 9 * 32 * 64 + 64 + 9 * 16 * 4 + 4, (2, 1, 28, 28)),
            2,
        ),
    },
    "gan_augment": {
        "discriminator": (16 * 12 + 12 + 16 * 12 * 24 + 24 + (24 * 49 + 1) * 10, (2, 10)),
        "generator": (42 * 24 * 49 + 2 * 24 + 16 * 24 * 12 + 2 * 12 + 16 * 12 + 1, (2, 1, 28, 28), 2),
        **dict.fromkeys(
            ("plain", "generated", "shifted", "both"),
            (16 * 12 + 12 + 16 * 12 * 24 + 24 + (24 * 49 + 1) * 10, (2, 10)),
        ),
    },
    "style_transfer": {
        **dict.fromkeys(
            ("plain_discriminator", "italic_discriminator"), (16 * 12 + 12 + 16 * 12 * 24 + 24 + 9 * 24 + 1, (2, 49))
        ),
        **dict.fromkeys(
            ("to_plain", "to_italic"),
            (16 * 12 + 16 * 12 * 48 + 2 * 9 * 48 * 48 + 2 * (12 + 3 * 48) + 9 * 24 * 4 + 4, (2, 1, 28, 28)),
        ),
    },
    "mnist_autoencoder": {
        "model": (
            784 * 512 + 512 + 512 * 256 + 256 + 256 * 32 + 32 + 32 * 256 + 256 + 256 * 512 + 512 + 512 * 784 + 784,
            (2, 784),
        )
    },
    "mnist_vit": {
        "model": (
            (49 + 1 + 1 + 17) * 64 + 3 * (4 * 65 * 64 + 65 * 128 + 129 * 64 + 4 * 64) + 2 * 64 + 65 * 10,
            (2, 10),
        )
    },
    "date_transformer": {
        "model": (
            (73 + 36 + 14 + 11) * 64  # embeddings
            + 2 * (12 * 64 * 64 + 13 * 64)  # encoder layers: attention, feed-forward, norms
            + 2 * (16 * 64 * 64 + 19 * 64)  # decoder layers
            + 4 * 64  # last norms
            + 65 * 14,
            (2, 11, 14),
        )
    },
    "mnist_rnn": {"model": (4 * (28 * 128 + 128 * 128 + 2 * 128) + 128 * 10 + 10, (2, 10))},
    "weather_rnn": {"model": (4 * (7 * 16 + 16 * 16 + 2 * 16) + (16 + 7) + 1, (2, 1))},
    "stock_rnn": {"model": (3 * (2 * 16 + 16 * 16 + 2 * 16) + 2 * 17, (2, 2))},
    "sentiment_rnn": {"model": (8574 * 64 + 3 * (2 * 64 * 64 + 2 * 64) + 2 * 129, (2, 2))},
    "spoken_digits": {
        "model": (
            160 + 16 * 16 * 9 + 16 + 2 * 3 * (128 * 32 + 32 * 32 + 2 * 32) + 65 * 10,
            (2, 10),
        )
    },
    "translation_rnn": {
        "model": (
            43 * 48  # embedding
            + 3 * 3 * (48 * 128 + 128 * 128 + 2 * 128)  # the encoder in both directions, the decoder
            + 257 * 128
            + 128 * 256
            + 385 * 128  # first state, query, combination
            + 129 * 43,
            (2, 33, 43),
        )
    },
    "char_rnn": {"model": (76 * 256 + 4 * (2 * 256 * 256 + 2 * 256) + 256 * 76 + 76, (2, 128, 76))},
    "char_gpt": {"model": (76 * 128 + 128 * 128 + 4 * (12 * 128 * 128 + 13 * 128) + 2 * 128, (2, 128, 76))},
    "char_bert": {
        "model": (77 * 128 + 128 * 128 + 4 * (12 * 128 * 128 + 13 * 128) + 2 * 128 + 128 * 76 + 76, (2, 128, 76))
    },
    "imagenet_resnet": {
        # ResNet-18 as published has 11,689,512 parameters, 513,000 of them in its last layer of 1,000 classes
        "model": (11_689_512 - 513_000 + 513 * 8, (2, 8))
    },
    "image_folder": {"model": (11_689_512 - 513_000 + 513 * 8, (2, 8))},
    "table_mlp": {
        # 4 numbers and a date of 7, each with its mark; layers of a norm and a square matrix
        "model": (23 * 64 + 2 * (2 * 64 + 65 * 64) + 2 * 64 + 65 * 5, (2, 5))
    },
    "text_file": {"model": (513 * 64 + 128 * 64 + 2 * (12 * 64 * 64 + 13 * 64) + 2 * 64 + 65 * 20, (2, 20))},
    "text_classifier_mlp": {"model": ((2**14 + 1) * 64 + 64 * 128 + 128 + 128 * 20 + 20, (2, 20))},
    "optimizers": dict.fromkeys(
        ("sgd", "momentum", "nag", "adagrad", "adadelta", "rmsprop", "adam"), (20 + 20 + 20 + 1, (2, 1))
    ),
    "descent": {
        f"{optimizer}_{start}": (2, (2,))
        for start in ("left", "right", "line")
        for optimizer in ("gd", "momentum", "nag", "adagrad", "adadelta", "rmsprop", "adam", "lbfgs", "newton")
    },
}


def trace(path: Path, folder: Path) -> dict[str, list[float]]:
    """The losses of the first steps of a recipe on data that is always there, and its scores after them."""
    settings = {"data_source": "sample", "progress": False, "figures": False, "threads": 1, "run": "trace"}
    recipe = with_few_examples(load_recipe(path))(**FEWER.get(path.stem, {}))
    result = nndist.train(recipe, max_steps=NUM_STEPS, log_every=1, runs_dir=folder, **settings)
    history = result.history
    names = [name for name in history.names() if "/" in name and name.partition("/")[0] not in TIMED]
    return {name: [float(f"{value:.6g}") for value in history.series(name)[1]] for name in names}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_network_is_the_documented_one(path, quick_reader):
    recipe = load_recipe(path)(**FEWER.get(path.stem, {}))
    recipe.validate()
    data = recipe.data(RunConfig(data_source="sample").data_config(download=False))
    batch = data.inputs(data.test, 0, 2)
    networks = recipe.networks()
    assert list(networks) == list(NETWORKS[path.stem])
    for name, network in networks.items():
        parameters, shape, *places = NETWORKS[path.stem][name]
        assert sum(p.numel() for p in network.parameters()) == parameters
        assert network(*(batch[place] for place in places or [0])).shape == shape


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_first_losses_are_those_kept(path, tmp_path, quick_reader):
    kept = json.loads(TRACES.read_text())[path.stem]
    found = trace(path, tmp_path)
    assert found.keys() == kept.keys()
    for name, values in kept.items():
        assert len(values) == len(found[name]) and all(math.isfinite(value) for value in values)
        # other processors round otherwise, and steps amplify it; most where BatchNorm sees maps of one pixel
        rough = path.stem in ("image_folder", "imagenet_resnet")
        if not rough or name.endswith("loss"):  # of the first 100 examples, a few may be taken for another class
            few = 2e-3 if "loss" in name else 3e-2
            assert found[name] == pytest.approx(values, rel=0.2 if rough else 2e-2, abs=few), name
        if name == "train/loss":
            assert len(values) == NUM_STEPS
            assert found[name][:3] == pytest.approx(values[:3], rel=2e-3 if rough else 1e-4)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_check_passes_with_figures(path, tmp_path, capsys, quick_reader):
    kind = load_recipe(path)
    if path.stem not in ("gan_augment", "text_classifier_mlp"):  # whose figures need the whole test set
        with_few_examples(kind)
    recipe = kind(**FEWER.get(path.stem, {}))
    nndist.train(recipe, check=True, data_source="sample", runs_dir=tmp_path, threads=1)
    assert "check passed" in capsys.readouterr().out


OF_DIGITS = [path.stem for path in RECIPES if re.match("mnist|digits|superres|style|gan", path.stem)]


@pytest.mark.parametrize("name", OF_DIGITS)
def test_an_image_recipe_shows_its_first_training_images(name, quick_reader):
    recipe = make(name, **FEWER.get(name, {}))
    data = recipe.data(RunConfig(data_source="sample").data_config(download=False))
    assert list(recipe.preview(data) or figures.training_images(data, name)) == ["training_images"]


@pytest.mark.long
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_goes_on_exactly(path, tmp_path, quick_reader):
    """Stopped in mid-epoch after 3 of 6 steps and gone on with: every bit of the checkpoint and every record."""
    settings = {"data_source": "sample", "progress": False, "figures": False, "report": False, "threads": 1}
    kind, fewer = with_few_examples(load_recipe(path)), FEWER.get(path.stem, {})
    nndist.train(kind(**fewer), max_steps=6, log_every=1, run="whole", runs_dir=tmp_path, **settings)
    for steps in (3, 6):
        nndist.train(kind(**fewer), max_steps=steps, log_every=1, run="parts", runs_dir=tmp_path, **settings)
    whole, parts = (tmp_path / path.stem / run / "checkpoints/step-00000006" for run in ("whole", "parts"))
    files = sorted(file.name for file in whole.glob("*.safetensors"))
    assert files == sorted(file.name for file in parts.glob("*.safetensors")) and "model.safetensors" in files
    for name in files:
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name


def test_the_pages_list_is_made_from_the_recipes():
    """`python launch/recipes.py --markdown` makes it."""
    table = markdown(entries(ROOT / "recipes"))
    assert (
        f"<!-- made by: python launch/recipes.py --markdown -->\n{table}\n<!-- end -->"
        in (ROOT / "recipes/README.md").read_text()
    )
    assert all(e.about and e.measured and f"`{e.name}`" in table for e in entries(ROOT / "recipes"))


def test_the_list_of_recipes_fits_a_terminal(tmp_path):
    listed = succeeded(command(ROOT / "launch/recipes.py", env={"COLUMNS": "80"})).stdout.splitlines()
    assert max(map(len, listed)) <= 80 and [line for line in listed if line[0] != " "] == [p.stem for p in RECIPES]
    done = command(ROOT / "launch/recipes.py", tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {tmp_path}: holds no recipes")


def test_a_recipe_that_inherits_from_another_has_its_own_name_and_text(tmp_path):
    mine = tmp_path / "wider.py"
    mine.write_text(
        '"""Wider."""\nfrom nndist.recipe import load_recipe\n\n'
        f'Base = load_recipe({str(ROOT / "recipes/sum_mlp.py")!r})\n\n\nclass Wider(Base):\n    """Wider."""\n'
    )
    made = load_recipe(mine)()
    assert made.name == "wider" and made.file == mine and made.source() == mine.read_bytes()


if __name__ == "__main__":
    import tempfile

    train_readers_in(20)  # as the fixture quick_reader
    with tempfile.TemporaryDirectory() as scratch:
        traces = {path.stem: trace(path, Path(scratch)) for path in RECIPES}
    TRACES.write_text(json.dumps(traces, indent=None).replace("}, ", "},\n ").replace("]}", "]}") + "\n")
