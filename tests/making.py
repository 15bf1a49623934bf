"""The shipped recipes by name: made, with the data that are always there, and what their runs have drawn."""

import sys
from functools import cache
from pathlib import Path

from launching import ROOT
from PIL import Image

from nndist.config import RunConfig
from nndist.data.sets import Resident
from nndist.recipe.loading import load_recipe


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


def with_few_test_examples(kind, count=100):
    """A recipe class, changed so that its recipes are evaluated on the first `count` examples of each set."""
    whole = kind.data

    def data(self, config):
        made = whole(self, config)
        made.test = first(made.test)
        made.more = {name: first(examples) for name, examples in made.more.items()}
        return made

    def first(examples):
        is_resident = isinstance(examples, Resident)
        return Resident(*(tensor[:count] for tensor in examples.tensors)) if is_resident else examples

    kind.data = data
    return kind


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
