"""Whatever ordinary code changes in its objects is restored in a new process, or named when it is saved: never lost in
silence. Each case is made twice, changed in one, saved, and restored in the other.
"""

import array
import collections
import dataclasses
import decimal
import fractions
import functools
import itertools
import queue
import random
import sys
import types
import weakref
from pathlib import Path

import numpy
import pytest
import torch
import torchvision
from torch import nn
from torchvision.transforms import v2 as transforms

from nndist.recipe.loading import load_recipe
from nndist.runs.python_state import PythonState
from nndist.runs.python_undo import CanNotBeUndone, Remembered

CODE = types.ModuleType("code_of_a_recipe")
exec(
    """
import enum, itertools, types, torch

class Kind(enum.Enum):
    A = 1
    B = 2

class Sub(list):
    pass

class Slots:
    __slots__ = ("level",)
    def __init__(self):
        self.level = 1

class Points(torch.utils.data.Dataset):
    def __init__(self, level=0):
        self.level = level
    def __len__(self):
        return 4
    def __getitem__(self, number):
        return number

class Holder(types.SimpleNamespace):
    pass

def function():
    def made(x):
        return x
    return made

def iterator():
    yield from itertools.count()
""",
    vars(CODE),
)
Holder, Kind, Points = CODE.Holder, CODE.Kind, CODE.Points


def linear(width=1):
    return nn.Linear(width, 1)


def layers():
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))


def with_buffer(value):
    network = layers()
    network.register_buffer("bank", value)
    return Holder(net=network)


def tied():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    return Holder(net=net)


def weights(holder):
    return torch.stack([layer.weight.detach() for layer in holder.net])


def one_step(holder):
    holder.scale.grad = torch.ones(2)
    holder.adam.step()


def adam():
    scale = nn.Parameter(torch.zeros(2))
    return Holder(scale=scale, adam=torch.optim.Adam([scale]))


def two():
    return Holder(a=linear(), b=linear(2))


def images(transform):
    return Holder(data=torchvision.datasets.FakeData(2, transform=transform))


def moved(mapping, key):
    mapping[key] = mapping.pop(key)


@dataclasses.dataclass
class Case:
    """make: objects as at the start. change: what training does to them. look: what it is then, to be compared."""

    make: object
    change: object
    look: object


def of(value, change, look=lambda it: it):
    """A case of one attribute, `it`, which `change` gets and changes in place."""
    return Case(lambda: Holder(it=value()), lambda holder: change(holder.it), lambda holder: look(holder.it))


def to(value, other, look=lambda it: it):
    """A case of one attribute that becomes another value."""
    return Case(lambda: Holder(it=value), lambda holder: setattr(holder, "it", other()), lambda holder: look(holder.it))


RESTORED = {
    # plain values
    "a flag that becomes a number": to(True, lambda: 1, type),
    "a zero's sign": to(0.0, lambda: -0.0, str),
    "a zero's sign, NumPy": to(numpy.float64(0), lambda: numpy.float64(-0.0), str),
    "infinity": to(1.0, lambda: float("inf")),
    "a long number": to(1, lambda: 1 << 70),
    "half a character": to("", lambda: "\ud800"),
    "an enum": to(Kind.A, lambda: Kind.B),
    "an enum for nothing": to(None, lambda: Kind.B),
    "enums as keys": of(lambda: {Kind.A: 1}, lambda it: it.update({Kind.A: 2, Kind.B: 3})),
    "a range": to(range(3), lambda: range(5)),
    "a slice": to(slice(3), lambda: slice(5)),
    "a fraction": to(fractions.Fraction(1, 2), lambda: fractions.Fraction(1, 3)),
    "a decimal": to(decimal.Decimal(1), lambda: decimal.Decimal("1.10"), str),
    "bytes that change": of(lambda: bytearray(b"a"), lambda it: it.extend(b"b")),
    "a NumPy scalar": to(numpy.float32(1), lambda: numpy.float32(2), lambda it: (type(it), it)),
    # containers
    "a set": of(lambda: {1}, lambda it: it.add(2)),
    "a frozenset": to(frozenset([1]), lambda: frozenset([1, 2])),
    "a subclass of list": of(lambda: CODE.Sub([1]), lambda it: it.append(2)),
    "a UserList": of(lambda: collections.UserList([1]), lambda it: it.append(2), list),
    "a ChainMap": of(lambda: collections.ChainMap({"a": 1}), lambda it: it.update(a=2), dict),
    "a defaultdict": of(lambda: collections.defaultdict(list), lambda it: it["a"].append(2), lambda it: it["a"]),
    "a Counter": of(collections.Counter, lambda it: it.update(a=2)),
    "a queue": of(queue.Queue, lambda it: it.put(3), lambda it: list(it.queue)),
    "a dict's order": of(lambda: {"a": 1, "b": 2}, lambda it: moved(it, "a"), list),
    "an OrderedDict's order": of(lambda: collections.OrderedDict(a=1, b=2), lambda it: it.move_to_end("a"), list),
    "tuples as keys": of(lambda: {(1, "a"): 1}, lambda it: it.update({(2, "b"): 5})),
    "tensors in a heap": of(lambda: [(1.0, torch.zeros(1))], lambda it: it.append((0.5, torch.ones(1))), str),
    "a dict's order, of modules": of(lambda: {"a": linear(), "b": linear(2)}, lambda it: moved(it, "a"), list),
    "a dict's missing module": of(lambda: {"a": linear(), "b": linear(2)}, lambda it: it.pop("a"), list),
    "a list's first module": of(
        lambda: [linear(), linear(2)], lambda it: it.pop(0), lambda it: [module.weight.tolist() for module in it]
    ),
    "a list of modules, emptied": of(lambda: [linear(), linear(2)], lambda it: it.clear(), len),
    "a ModuleDict's order": of(
        lambda: nn.ModuleDict({"a": linear(), "b": linear(2)}), lambda it: it.update({"a": it.pop("a")}), list
    ),
    "a module that is removed": of(layers, lambda it: it.pop(1), len),
    "layers that change places": of(
        layers,
        lambda it: it._modules.update({"0": it[1], "1": it[0]}),
        lambda it: [layer.in_features for layer in it],
    ),
    "a deque of modules": Case(
        lambda: Holder(a=linear(), b=linear(2), it=collections.deque(maxlen=1)),
        lambda holder: holder.it.extend([holder.a, holder.b]),
        lambda holder: [module.in_features for module in holder.it],
    ),
    "a module in a new entry": Case(
        lambda: Holder(a=linear(), it={}),
        lambda holder: holder.it.update(x=holder.a),
        lambda holder: holder.it.get("x") is holder.a,
    ),
    # tensors
    "a parameter's attribute": of(
        layers, lambda it: setattr(it[0].weight, "slow", torch.ones(2)), lambda it: getattr(it[0].weight, "slow", None)
    ),
    "a tensor's attribute": of(
        lambda: torch.zeros(2), lambda it: setattr(it, "count", 3), lambda it: getattr(it, "count", 0)
    ),
    "a gradient that is kept": of(
        layers, lambda it: setattr(it[0].weight, "grad", torch.ones(2, 3)), lambda it: it[0].weight.grad
    ),
    "a tensor that takes gradients": of(
        lambda: torch.zeros(2), lambda it: it.requires_grad_(), lambda it: it.requires_grad
    ),
    "a bfloat16 tensor": of(lambda: torch.zeros(2, dtype=torch.bfloat16), lambda it: it.add_(1)),
    "a parameter of another shape": of(
        layers, lambda it: setattr(it[0], "weight", nn.Parameter(torch.ones(5, 3))), lambda it: it[0].weight.detach()
    ),
    "a parameter that is removed": of(layers, lambda it: setattr(it[0], "bias", None), lambda it: it[0].bias),
    "a buffer that is removed": Case(
        lambda: with_buffer(torch.zeros(2)),
        lambda holder: setattr(holder.net, "bank", None),
        lambda holder: holder.net.bank,
    ),
    "a buffer that is made": Case(
        lambda: with_buffer(None),
        lambda holder: setattr(holder.net, "bank", torch.ones(2)),
        lambda holder: holder.net.bank,
    ),
    "tied weights": Case(tied, lambda holder: holder.net[0].weight.data.add_(1), weights),
    "weights that are untied": Case(
        tied, lambda holder: setattr(holder.net[1], "weight", nn.Parameter(torch.ones(2, 2))), weights
    ),
    "weights that are tied": Case(
        lambda: Holder(net=nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))),
        lambda holder: setattr(holder.net[1], "weight", holder.net[0].weight),
        lambda holder: holder.net[1].weight is holder.net[0].weight,
    ),
    "an optimizer": Case(adam, one_step, lambda holder: holder.adam.state[holder.scale].get("exp_avg")),
    "an average of weights": Case(
        lambda: Holder(net=(net := linear()), mean=torch.optim.swa_utils.AveragedModel(net)),
        lambda holder: holder.mean.update_parameters(holder.net),
        lambda holder: int(holder.mean.n_averaged),
    ),
    # objects
    "an attribute that is deleted": of(lambda: Holder(x=1), lambda it: delattr(it, "x"), lambda it: hasattr(it, "x")),
    "a module that is deleted": of(
        lambda: Holder(x=linear()), lambda it: delattr(it, "x"), lambda it: hasattr(it, "x")
    ),
    "a module's attribute that is deleted": of(
        lambda: nn.BatchNorm1d(2), lambda it: delattr(it, "momentum"), lambda it: hasattr(it, "momentum")
    ),
    "a slot": of(CODE.Slots, lambda it: setattr(it, "level", 2), lambda it: it.level),
    "objects in objects": of(
        lambda: Holder(inner=Holder(of=[1])), lambda it: it.inner.of.append(4), lambda it: it.inner.of
    ),
    "a new object of the class": Case(
        lambda: Holder(it=Points(0)), lambda holder: setattr(holder, "it", Points(3)), lambda holder: holder.it.level
    ),
    "a function's attribute": of(CODE.function, lambda it: setattr(it, "calls", 2), lambda it: getattr(it, "calls", 0)),
    "arguments of a partial": to(functools.partial(max, 1), lambda: functools.partial(max, 5), lambda it: it(2)),
    "a mode": of(nn.Dropout, lambda it: it.eval(), lambda it: it.training),
    "a random generator": of(lambda: random.Random(1), lambda it: it.random(), lambda it: it.getstate()),
    # a library's datasets
    "the dataset of a subset": of(
        lambda: torch.utils.data.Subset(Points(), [0, 1]),
        lambda it: setattr(it.dataset, "level", 2),
        lambda it: it.dataset.level,
    ),
    "a transform's strength": Case(
        lambda: images(transforms.RandomRotation(3)),
        lambda holder: setattr(holder.data.transform, "degrees", [5.0, 6.0]),
        lambda holder: holder.data.transform.degrees,
    ),
}

NAMED = {
    "array.array": of(lambda: array.array("d", [1.0]), lambda it: it.append(2.0)),
    "complex128": of(lambda: torch.zeros(2, dtype=torch.complex128), lambda it: it.add_(2)),
    "a sparse tensor": to(torch.eye(2).to_sparse(), lambda: (2 * torch.eye(2)).to_sparse()),
    "a record array": of(lambda: numpy.zeros(2, dtype=[("a", "f4")]), lambda it: it.__setitem__("a", 2)),
    "an object array": of(lambda: numpy.array([1, "a"], dtype=object), lambda it: it.__setitem__(0, 2)),
    "a count": of(itertools.count, next),
    "a cycle": of(lambda: itertools.cycle([1, 2, 3]), next),
    "a generator": of(CODE.iterator, next),
    "another function": to(lambda x: x, lambda: lambda x: 2 * x),
    "another proxy": to(types.MappingProxyType({"a": 1}), lambda: types.MappingProxyType({"a": 2})),
    "an open file": to(None, lambda: Path("/dev/null").open()),  # noqa: SIM115
    "an object for nothing": to(None, Points),
    "another transform": Case(
        lambda: images(None), lambda holder: setattr(holder.data, "transform", transforms.RandomRotation(3)), None
    ),
    "a hook": of(layers, lambda it: it[0].register_forward_hook(lambda module, args, out: out * 2)),
    "a patched method": of(layers, lambda it: setattr(it[0], "forward", lambda x: x)),
    "a module that is made": of(layers, lambda it: it.append(linear())),
    "a module in a list that is made": of(list, lambda it: it.append(linear())),
    "a new list of modules": Case(two, lambda holder: setattr(holder, "it", [holder.a]), None),
    "a new dict of modules": Case(two, lambda holder: setattr(holder, "it", {"a": holder.a}), None),
    "a new set of modules": Case(two, lambda holder: setattr(holder, "it", {holder.a}), None),
    "a module as a key": Case(
        lambda: Holder(a=linear(), it={}), lambda holder: holder.it.__setitem__(holder.a, 2), None
    ),
    "a set of modules": Case(lambda: Holder(a=linear(), it=set()), lambda holder: holder.it.add(holder.a), None),
    "a frozenset of modules": Case(
        lambda: Holder(a=(a := linear()), b=linear(2), it=frozenset([a])),
        lambda holder: setattr(holder, "it", frozenset([holder.b])),
        None,
    ),
    "what a set holds": of(lambda: {nn.Dropout(0.1)}, lambda it: setattr(next(iter(it)), "p", 0.5)),
    "a tuple of numbers that holds a module": Case(
        lambda: Holder(a=linear(), it=(1, 2)), lambda holder: setattr(holder, "it", (holder.a, 2)), None
    ),
    "a list of numbers that holds a module": Case(
        lambda: Holder(a=linear(), it=[1, 2, 3]), lambda holder: setattr(holder, "it", [holder.a]), None
    ),
    "a weak reference": Case(
        lambda: Holder(a=(a := linear()), b=linear(2), it=weakref.ref(a)),
        lambda holder: setattr(holder, "it", weakref.ref(holder.b)),
        None,
    ),
    "weak keys": Case(
        lambda: Holder(a=linear(), it=weakref.WeakKeyDictionary()),
        lambda holder: holder.it.__setitem__(holder.a, 2),
        None,
    ),
    "a view of weights": Case(
        lambda: Holder(net=layers(), it=None), lambda holder: setattr(holder, "it", holder.net[0].weight.data[:1]), None
    ),
}


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, CODE.__name__, CODE)


def made(case):
    torch.manual_seed(0)
    holder = case.make()
    networks = {"model": holder.net} if hasattr(holder, "net") and case.look is None else {}
    return holder, PythonState(holder, networks)


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and torch.equal(one, other)
    return one == other


@pytest.mark.parametrize("name", RESTORED)
def test_it_is_restored(name):
    case = RESTORED[name]
    holder, state = made(case)
    assert state.changes() == ([], [])
    case.change(holder)
    changes, lost = state.changes()
    assert changes and not lost
    other, state_of_other = made(case)
    assert not equal(case.look(holder), case.look(other))
    assert state_of_other.restore(changes) == []
    assert equal(case.look(holder), case.look(other))


@pytest.mark.parametrize("name", NAMED)
def test_it_is_named(name):
    """And nothing of it is saved that would be restored by halves."""
    case = NAMED[name]
    holder, state = made(case)
    case.change(holder)
    changes, lost = state.changes()
    assert lost and changes == []
    _, other = made(case)
    assert other.restore(changes) == []


def test_a_class_of_iterators_that_a_module_imports_is_none(tmp_path):
    """`from itertools import pairwise` on top of a recipe would else be a value that can't be put back."""
    top = "from collections.abc import Iterator\nfrom itertools import cycle, pairwise\nfrom nndist import Recipe\n"
    (tmp_path / "it.py").write_text(f"{top}\n\nclass It(Recipe):\n    kept = [1.0]\n")
    recipe = load_recipe(tmp_path / "it.py")()
    state = PythonState(recipe, {})
    state.begin()
    before = Remembered(state)
    type(recipe).kept.append(2.0)
    before.put_back()
    assert type(recipe).kept == [1.0] and state.changes() == ([], [])
    sys.modules[type(recipe).__module__].numbers = iter([1])
    with pytest.raises(CanNotBeUndone):
        Remembered(PythonState(recipe, {}))
