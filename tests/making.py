"""The shipped recipes by name: made, with the data that are always there, and what their runs have drawn."""

import sys
from functools import cache
from pathlib import Path

from launching import ROOT
from PIL import Image

from nndist.config import RunConfig
from nndist.data.sets import Resident
from nndist.recipe.loading import load_recipe

FEWER = {
    **{name: {"num_train": 640, "num_test": 100} for name in ("digits_detector", "digits_unet")},
    "date_transformer": {"num_train": 1000, "batch_size": 32},
    "style_transfer": {"num_train": 640},
    **{name: {"batch_size": 4} for name in ("char_bert", "char_gpt", "char_rnn")},
    "translation_rnn": {"batch_size": 16},
    "image_folder": {"batch_size": 16},
    "imagenet_resnet": {"batch_size": 64},
}
"""Fields of recipes whose whole sets of examples, or whose batches, take seconds."""


def path_of(name: str) -> Path:
    return ROOT / f"recipes/{name}.py"


@cache
def _loaded(name):
    kind = load_recipe(path_of(name))
    return kind, sys.modules[kind.__module__]  # another load, such as a training's, puts a new module there


def module_of(name):
    """The module that `make` takes a recipe from, for what lies beside its class."""
    return _loaded(name)[1]


def make(name, **fields):
    """A recipe with these fields; raises UserError where they can't be meant."""
    recipe = _loaded(name)[0](**fields)
    recipe.validate()
    return recipe


def data_of(name, **fields):
    """The data of a recipe: of digits those of the embedded sample."""
    return make(name, **fields).data(RunConfig(data_source="sample").data_config(download=False))


def with_few_examples(kind, *, test=100, train=None):
    """A recipe class, changed so that its recipes have the first `test` examples of each set, and `train` to train on.

    For tests in which evaluating whole sets would take most of the time.
    """
    whole = kind.data

    def first(examples, count):
        resident = isinstance(examples, Resident) and count is not None
        return Resident(*(tensor[:count] for tensor in examples.tensors)) if resident else examples

    def data(self, config):
        made = whole(self, config)
        training = made.train  # also a further set to evaluate, of some
        made.train, made.test = first(training, train), first(made.test, test)
        made.more = {
            name: made.train if examples is training and train else first(examples, test)
            for name, examples in made.more.items()
        }
        return made

    kind.data = data
    return kind


def train_readers_in(steps) -> int:
    """Sets in how many steps this process trains classifiers that judge images, and returns in how many it did.

    For tests that are not about what they judge: 300 steps take seconds.
    """
    from nndist.datasets.styles import trained_judge
    from nndist.figures.generated_images import trained_reader

    (before,), trained_reader.__defaults__ = trained_reader.__defaults__, (steps,)
    trained_judge.cache_clear()
    return before


def figure(result, name) -> Path:
    """The file of a figure that the result of a training names."""
    path = result.folder / "figures" / name
    assert path in result.figures
    return path


def is_drawn(path) -> bool:
    """Whether an image shows something: over more than a thousandth of it a colour that is not the commonest."""
    with Image.open(path) as image:
        counts = sorted(image.convert("L").histogram())
        return min(image.size) > 200 and sum(counts[:-1]) > 0.001 * sum(counts)
