"""What a recipe's data found out comes back from a run's folder, also from one that an older nndist wrote."""

import enum
import functools
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy
import pytest
import torch

from nndist import Scaling
from nndist.recipe.kept import alike, kept, missed, restored

SCALING = Scaling(torch.tensor([1.0]), torch.tensor([2.0]))
VALUES = {
    "classes": ["a", "b"],
    "sizes": (1, 2.5, None),
    "words": {"x": 1, "$y": 2},
    "by_number": {1: "one"},
    "seen": {3, 4},
    "file": Path("a/b"),
    "endless": math.inf,
    "scaling": SCALING,
    "vectors": torch.arange(3),
    "array": numpy.ones((2, 2)),
    "frozen": frozenset("q"),
}
OLD = {
    "classes": ["a", "b"],
    "sizes": {"$tuple": [1, 2.5, None]},
    "words": {"$dict": [["x", 1], ["$y", 2]]},
    "by_number": {"$dict": [[1, "one"]]},
    "seen": {"$set": [3, 4]},
    "file": {"$path": "a/b"},
    "endless": {"$float": "inf"},
    "scaling": {"$scaling": [{"$tensor": "scaling.mean"}, {"$tensor": "scaling.std"}]},
    "vectors": {"$tensor": "vectors"},
    "array": {"$array": "array"},
    "frozen": {"$frozenset": ["q"]},
}
OLD_TENSORS = {
    "scaling.mean": torch.tensor([1.0]),
    "scaling.std": torch.tensor([2.0]),
    "vectors": torch.arange(3),
    "array": torch.ones(2, 2, dtype=torch.float64),
}


def as_read(found, tensors):
    return restored(json.loads(json.dumps(found, allow_nan=False)), tensors)


@pytest.mark.parametrize("found, tensors", [kept(VALUES), (OLD, OLD_TENSORS)], ids=["now", "until 2026-11-29"])
def test_values_come_back_as_they_were(found, tensors):
    again = as_read(found, tensors)
    assert again.keys() == VALUES.keys()
    for name, value in VALUES.items():
        assert type(again[name]) is type(value)
        assert numpy.all(again[name] == value) if name == "array" else str(again[name]) == str(value), name
    assert again["array"].dtype == numpy.float64


class Colour(enum.Enum):
    RED = 1


NOT_KEPT = {
    "an enum, whose class is code": Colour.RED,
    "a generator": torch.Generator(),
    "an object": object(),
    "more than a million numbers": torch.zeros(1_000_001),
    "and in an array": numpy.zeros(1_000_001),
    "and in a list": [0] * 1_000_001,
    "what safetensors does not hold": torch.zeros(1, dtype=torch.complex64),
    "objects in an array": numpy.array([object()]),
    "something of it in a list": [1, object()],
}


@pytest.mark.parametrize("what", NOT_KEPT)
def test_what_can_not_be_made_anew_is_left_out(what):
    assert kept({"value": NOT_KEPT[what], "other": 1}) == ({"other": 1}, {})


def test_values_do_not_share_memory_with_what_was_kept_and_need_no_gpu():
    parameter = torch.nn.Parameter(torch.zeros(2))
    counts = defaultdict(list, a=[numpy.float32(0.5)])
    found, tensors = kept({"parameter": parameter, "counts": counts})
    with torch.no_grad():
        parameter.fill_(1.0)
    again = as_read(found, tensors)
    assert again == {"parameter": again["parameter"], "counts": {"a": [0.5]}}
    assert again["parameter"].tolist() == [0.0, 0.0] and not again["parameter"].requires_grad
    assert '"device": "cpu"' in json.dumps(found)


def test_values_are_alike_but_for_rounding():
    for name, value in VALUES.items():
        assert alike(value, value) and not alike(value, "other"), name
    assert alike(0.1 + 0.2, 0.3) and not alike(0.3, 0.31) and alike(object(), 1)
    assert alike(torch.ones(3), torch.ones(3) + 1e-7) and not alike(torch.ones(3), torch.ones(3) + 1e-3)
    assert not alike(["a", "b"], ["b", "a"]) and not alike(torch.ones(3), torch.ones(4)) and not alike(SCALING, None)


class Words:
    def __len__(self):
        return 3


class Unkept:
    """Of a recipe, what decides whether a value that can't be kept is missed."""

    def __post_init__(self):
        self.rebuilt = Words()

    @functools.cached_property
    def cached(self):
        return Words()

    def data(self, config):
        self.words = self.only_in_data = self.encoder = Words()

    def networks(self):
        return {"model": [self.size() for _ in range(3)], "other": [self.rebuilt, self.cached]}

    def size(self):
        return len(self.words)

    def predict(self, networks, inputs):
        return [self.encoder(text) for text in inputs]


def test_what_is_not_kept_and_missed_is_noted():
    for name, is_noted in (("words", 1), ("encoder", 1), ("only_in_data", 0), ("rebuilt", 0), ("cached", 0)):
        note = missed(kept({name: Words(), "size": 3}).left_out, Unkept)
        assert bool(note) == bool(is_noted), name
        assert not note or f"data() sets self.{name} to an object of Words, which a run can't keep" in note
    assert kept(VALUES).left_out == {} and kept({"long": ["x" * 1000] * 5000}).left_out == {"long": "list"}
