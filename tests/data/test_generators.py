"""Which generators are found, and so seeded for each example, wherever the user's code has them."""

import importlib
import random
import sys
import sysconfig
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch

from nndist.data import randomness
from nndist.data.randomness import Generators
from nndist.data.sets import Streamed
from nndist.errors import UserError


class Holder:
    def __init__(self, **parts):
        vars(self).update(parts)


def found_in(*holders):
    return {id(generator) for _, generator in Generators(**dict(zip("abc", holders, strict=False)))._found}


def new_module(folder, name, text, monkeypatch):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


NOISE = """
import numpy
from numpy.random import default_rng

RNG = default_rng(0)

class Noise:
    own = default_rng(1)

    def __call__(self, x):
        return x + self.own.random() + RNG.random()

def jitter(x):
    return x + RNG.random()
"""


@pytest.mark.parametrize("prefix", ["env", "."])
def test_a_project_beside_or_around_its_environment_is_the_users(tmp_path, monkeypatch, prefix):
    monkeypatch.setattr(sys, "prefix", str(tmp_path / prefix))
    module = new_module(tmp_path / "env_project", f"noise_of_{len(prefix)}", NOISE, monkeypatch)
    assert {id(module.RNG), id(module.Noise.own)} <= found_in(module.Noise())


@pytest.mark.parametrize(
    "file, is_users",
    [
        (f"{sysconfig.get_path('stdlib')}/random.py", False),
        (f"{sysconfig.get_path('stdlib')}_of_mine/random.py", True),
        (f"{sysconfig.get_path('purelib')}/timm/data.py", False),
        ("/usr/lib/python3/dist-packages/timm/data.py", False),
        (f"{Path(randomness.__file__).parent}/sets.py", False),
        (f"{Path(sys.prefix)}/src/project/data.py", True),
        ("/home/me/site-packages-of-mine/data.py", True),
        ("<ipython-input-3-0123456789ab>", True),
        ("<frozen os>", False),
        (None, False),
    ],
)
def test_what_is_a_library(file, is_users):
    assert randomness._is_users(file) == is_users


def test_a_module_of_the_users_is_searched_for_what_the_code_names(tmp_path, monkeypatch):
    new_module(tmp_path / "modules/augmentations", "__init__", "", monkeypatch)
    (tmp_path / "modules/augmentations/noise.py").write_text(NOISE + "class Unnamed:\n    own = default_rng(2)\n")
    new_module(
        tmp_path / "modules",
        "reader",
        "import augmentations.noise\nimport augmentations.noise as noise\n\n"
        "class ByAlias:\n    def __getitem__(self, i):\n        return noise.jitter(i)\n\n"
        "class ByPath:\n    def __getitem__(self, i):\n        return augmentations.noise.Noise()(i)\n\n"
        "class ByImport:\n    def __getitem__(self, i):\n        import augmentations.noise\n"
        "        return augmentations.noise.jitter(i)\n",
        monkeypatch,
    )
    reader, noise = sys.modules["reader"], sys.modules["augmentations.noise"]
    for kind in (reader.ByAlias, reader.ByPath, reader.ByImport):
        assert id(noise.RNG) in found_in(kind()), kind
    assert id(noise.Noise.own) in found_in(reader.ByPath())
    assert id(noise.RNG) in found_in(Holder(noise=noise))
    assert id(noise.Unnamed.own) not in found_in(reader.ByPath(), reader.ByAlias())


def test_annotations_do_not_hide_the_transforms(monkeypatch):
    def annotations(number):
        objects = [{"box": [1, 2, 3.5, 4], "label": np.int64(1), "mask": np.zeros(2)} for _ in range(12)]
        return {"file": f"{number}.jpg", "objects": objects, "size": (3, 4), "tensor": torch.zeros(1)}

    own = random.Random(0)
    dataset = Holder(
        annotations=[annotations(number) for number in range(2000)],
        transform=Holder(transforms=[Holder(transforms=[Holder(own=own)])]),
    )
    assert id(own) in found_in(dataset)
    monkeypatch.setattr(randomness, "MOST_PLAIN", 1000)  # not even told from others are they in the way
    assert id(own) in found_in(dataset)


def test_what_looks_plain_is_not_if_a_generator_lies_in_it():
    own, another = random.Random(0), random.Random(1)
    table = [{"a": [1, 2]}, {"a": [1, (2, own)]}]
    table.append(table)
    assert id(own) in found_in(Holder(table=table))
    assert id(another) in found_in(Holder(table=[Holder(n=n) for n in range(500)] + [another]))


def test_too_many_objects_are_one_line():
    def tree(depth):
        return Holder(left=tree(depth - 1), right=tree(depth - 1)) if depth else None

    with pytest.raises(
        UserError, match=r"^dataset: holds more than 20,000 objects, such as dataset\.tree\.(left|right)"
    ):
        Generators(dataset=Holder(tree=tree(15)), decode=None)


def test_sets_and_running_iterators_are_searched():
    owns = [random.Random(number) for number in range(6)]

    def draws(generator):
        yield generator.random()
        yield MODULES_OWN.random()

    running = draws(owns[4])
    next(running)
    dataset = Holder(few={owns[0], 3}, frozen=frozenset([owns[1]]), queue=deque([owns[2]]), items={"a": (owns[3],)})
    dataset.running, dataset.ended = running, draws(owns[5])
    list(dataset.ended)
    assert {id(own) for own in (*owns[:5], MODULES_OWN)} <= found_in(dataset)


MODULES_OWN = random.Random(5)


@pytest.mark.parametrize("kind", ["PCG64", "MT19937", "Philox"])
def test_children_of_a_generator_are_functions_of_the_example(kind):
    class Spawning:
        def __init__(self):
            self.own = np.random.Generator(getattr(np.random, kind)(0))

        def __len__(self):
            return 6

        def __getitem__(self, number):
            (child,) = self.own.spawn(1)
            return torch.tensor([self.own.random(), child.random()])

    dataset = Spawning()
    sequence = dataset.own.bit_generator.seed_seq
    whole = next(Streamed(dataset, 0).batches([torch.arange(6)]))[0]
    for num_workers in (0, 2):
        halves = Streamed(dataset, num_workers).batches([torch.tensor([3, 4, 5]), torch.tensor([0, 1, 2])])
        last, first = (batch[0] for batch in halves)
        assert torch.equal(torch.cat([first, last]), whole)
    assert whole.unique().numel() == whole.numel()
    assert dataset.own.bit_generator.seed_seq is sequence and sequence.n_children_spawned == 0
