"""The Python state that training changes: counters, flags, queues, generators; as JSON and tensors, and back.

A recipe is ordinary Python, and what it does may depend on more than the weights: a call counter, an annealed
temperature, a queue of past outputs, a random generator, a frozen layer. Everything reachable from the recipe, its
networks and its modules is compared with its value at the start; what has changed is saved, and restored in the same
places of a freshly built recipe and networks. What can't be saved without pickle is reported by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import importlib
import itertools
import math
import os
import random
import sys
import types
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..distributed.blocks import local
from ..torch_internals import hooks_of, non_persistent_buffers
from .fingerprints import fingerprint
from .python_values import MOST_DEPTH, MOST_ITEMS, Held, Json, Unsavable, decode, encode

Path_ = tuple[str, ...]
IS = "<is>"
"""After a path: which object it stands for, apart from what that object holds."""
LIBRARIES = ("torch.nn.functional", "torch", "torch.special", "math")
"""Whose functions an attribute may be set to in training."""


@dataclasses.dataclass
class Change:
    """A place whose value has changed since the start: its path, and its current value as JSON and tensors."""

    path: Path_
    value: Json
    tensors: dict[str, Tensor]

    @property
    def name(self) -> str:
        return readable(self.path)


def readable(path: Path_) -> str:
    """A path in Python's notation, for people."""
    parts = (part if part.startswith(("[", ".")) else f".{part}" for part in path if part not in (IS, "<hooks>"))
    return "".join(parts).lstrip(".")


class PythonState:
    """The values of all objects of a recipe and its networks at the time this was created."""

    def __init__(
        self, recipe: Any, networks: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer] | None = None
    ):
        self.recipe, self.networks, self.optimizers = recipe, networks, optimizers or {}
        self._num_modules, self._beside = 0, set[str]()
        self.before: dict[Path_, Any] = {}
        self._made: set[Path_] = set()
        self._started: dict[int, tuple[Path_, weakref.ref[Any]]] = {}  # by id: where an object was at the start
        self.begin()

    def begin(self) -> None:
        """Records places not seen before, such as an optimizer's attributes, with their current values."""
        for place in self._places():
            if place.path in self._made:
                continue
            for value in _objects_in(place.value):
                if id(value) not in self._started or self._started[id(value)][1]() is not value:
                    with contextlib.suppress(TypeError):  # no weak references to its class
                        self._started[id(value)] = (place.path, weakref.ref(value))
            # the making of an optimizer or lazy layer may change its class and hooks
            if isinstance(place.value, _Is) or place.path[-1] == "<hooks>":
                self.before[place.path] = _mark(place.value)
            else:
                self.before.setdefault(place.path, _mark(place.value))

    def made_once(self) -> None:
        """What is there now and was not at the start is made once per run, and so has to be saved."""
        self._made = {place.path for place in self._places()} - self.before.keys()

    @property
    def user_modules(self) -> set[str]:
        """The recipe's own module, and those beside it, which may be imported late."""
        if len(sys.modules) != self._num_modules:
            self._num_modules, self._beside = len(sys.modules), _modules_beside(self.recipe)
        return {type(self.recipe).__module__} | self._beside

    def changes(self) -> tuple[list[Change], list[str]]:
        """What has changed since the start, and the names of changed values that can't be saved."""
        found: list[Change] = []
        lost: list[str] = []
        walk = _Walk(self.user_modules, objects=False)
        memory = {_memory_of(t) for net in self.networks.values() for t in (*net.parameters(), *net.buffers())}
        for place in self._places(walk):
            if isinstance(place.value, _Is) and (start := self._elsewhere(place)) is not None:
                found.append(Change(place.path, {"from": list(start)}, {}))
                continue
            if place.path in self.before and self.before[place.path] == _mark(place.value):
                continue
            if isinstance(place.value, _Shape) and place.value.has_grown(self.before.get(place.path)):
                continue  # by keys that can be set again
            if place.path not in self.before and isinstance(place.value, _Shape):
                continue  # its items are places of their own
            if place.path not in self.before and isinstance(place.value, _Is) and place.path[0].startswith("module "):
                self.before[place.path] = _mark(place.value)  # as a late import has it
                continue
            tensors = Held(self._is_original)
            try:
                if isinstance(place.value, Tensor) and self._is_late_view(place.value, memory):
                    raise Unsavable  # it would come back as a copy
                if isinstance(place.value, _Is):
                    found.append(Change(place.path, self._said(place.value, walk), {}))
                    continue
                found.append(Change(place.path, self._encoded(place.value, tensors), tensors))
            except Unsavable:
                lost.append(readable(place.path))
        within = tuple(f"{name}{mark}" for name in lost for mark in ".[")
        return found, sorted({name for name in lost if not name.startswith(within)})

    def _is_original(self, value: Any) -> bool:
        """Whether an object was there at the start, in whichever place."""
        return id(value) in self._started and self._started[id(value)][1]() is value

    def _is_late_view(self, value: Tensor, memory: set[int | None]) -> bool:
        """Whether a tensor shares memory with the networks, and did not at the start."""
        return _memory_of(value) in memory - {None} and not self._is_original(value)

    def _elsewhere(self, place: _Place) -> Path_ | None:
        """The place at the start of an object that a name stands for now, if it was another one."""
        held = place.value
        if held.first is not None or isinstance(held.value, _BY_NAME) or not self._is_original(held.value):
            return None
        start = _without_is(self._started[id(held.value)][0])
        return None if start == _without_is(place.path) else start

    def _at_start(self, path: Path_) -> Any:
        """The object that was in a place at the start of this process; raises LookupError."""
        for place, reference in self._started.values():
            if _without_is(place) == path and (value := reference()) is not None:
                return value
        raise LookupError

    def _encoded(self, value: Any, tensors: dict[str, Tensor]) -> Json:
        """A value as JSON and tensors; raises Unsavable."""
        if not isinstance(value, nn.Parameter):
            return encode(value, tensors)
        return {**encode(value.detach(), tensors), "parameter": value.requires_grad}

    def _said(self, held: _Is, walk: _Walk) -> Json:
        """What a name stands for, as JSON; raises Unsavable if it can't be found again."""
        if held.first is not None:
            return {"same": list(held.first)}
        if isinstance(held.value, types.MethodType):
            owner = walk.seen.get(id(held.value.__self__))
            if owner is not None and getattr(held.value.__self__, held.value.__name__, None) == held.value:
                return {"method": [list(owner), held.value.__name__]}
        for name in (*LIBRARIES, *sorted(self.user_modules)):
            short = getattr(held.value, "__name__", "")
            if short and vars(sys.modules.get(name, types)).get(short) is held.value:
                return {"named": [_module_title(name), short]}
        raise Unsavable

    def _meant(self, said: Json, walk: _Walk) -> Any:
        """The object that `_said` described; raises LookupError if there is none."""
        if "same" in said:
            return walk.first[tuple(said["same"])]
        if "from" in said:
            return self._at_start(tuple(said["from"]))
        if "method" in said:
            owner, name = said["method"]
            return getattr(walk.first[tuple(owner)], name)
        title, short = said["named"]
        for name in (*LIBRARIES, *self.user_modules):
            if _module_title(name) == title and name in sys.modules:
                return vars(sys.modules[name])[short]
        raise LookupError

    def trained_outside(self) -> list[Tensor]:
        """Tensors outside the networks that take gradients, which nothing sums over the processes."""
        own = {id(parameter) for network in self.networks.values() for parameter in network.parameters()}
        tensors = [place.value for place in self._places() if isinstance(place.value, Tensor)]
        return [t for t in tensors if t.is_leaf and t.requires_grad and id(t) not in own]

    def values(self, paths: Collection[tuple[str, ...]]) -> list[Change]:
        """The values of these places, changed or not, as far as they exist and can be saved."""
        found: list[Change] = []
        for place in self._places():
            if place.path in paths and not isinstance(place.value, _Shape | _Is):
                tensors: dict[str, Tensor] = {}
                with contextlib.suppress(Unsavable):
                    found.append(Change(place.path, self._encoded(place.value, tensors), tensors))
        return found

    def restore(self, changes: list[Change]) -> list[str]:
        """Restores saved values; returns the names of those whose place no longer exists."""
        missing = []
        for change in changes:
            self._import(change.path)
        names = [change for change in changes if change.path[-1] == IS]
        missing += self._set_names([change for change in names if {"named", "from"} & change.value.keys()])
        places = {place.path: place for place in self._places()}
        for change in changes:
            if change.path[-1] == IS:
                continue
            try:
                if change.path not in places:  # a restored value may contain it, or it was created later
                    places = {place.path: place for place in self._places(objects=True)}
                if change.path in places:
                    place = places[change.path]
                    place.set(decode(change.value, change.tensors, like=place.value))
                else:
                    parent = places[change.path[:-1]]
                    _set_new(parent.value, change.path[-1], decode(change.value, change.tensors, like=None))
            except (LookupError, AttributeError, TypeError, ValueError):
                missing.append(change.name)
        return missing + self._set_names([change for change in names if {"same", "method"} & change.value.keys()])

    def _set_names(self, changes: list[Change]) -> list[str]:
        """Makes names stand for what they stood for; returns those whose object or place no longer exists."""
        missing = []
        if changes:
            walk = _Walk(self.user_modules, objects=True)
            places = {place.path: place for place in self._places(walk)}
            for change in changes:
                owner, name = change.path[:-2], change.path[-2]
                try:
                    meant = self._meant(change.value, walk)
                    if (place := places.get(change.path) or places.get(change.path[:-1])) is not None:
                        place.set(meant)
                    else:
                        _set_new(places[owner].value, name, meant)
                except (LookupError, AttributeError, TypeError, ValueError):
                    missing.append(change.name)
        return missing

    def _import(self, path: Path_) -> None:
        """Imports a module beside the recipe that was imported late, and whose values are to be restored."""
        if not path[0].startswith("module ") or getattr(self.recipe, "file", None) is None:
            return
        name = path[0].removeprefix("module ")
        for part in ("", *path[1:]):  # a package's modules are attributes of it
            name += f".{part}" * bool(part)
            place = name.replace(".", "/")
            if name not in sys.modules and {f"{place}.py", f"{place}/__init__.py"} & self.recipe.helpers().keys():
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)

    def _places(self, walk: _Walk | None = None, *, objects: bool = False) -> Iterator[_Place]:
        walk = walk or _Walk(self.user_modules, objects)
        for name, optimizer in self.optimizers.items():
            walk.note((f"optimizers[{name!r}]",), optimizer)
        for name, network in self.networks.items():
            for place, module in network.named_modules(remove_duplicate=False):
                path = (f"networks[{name!r}]", *filter(None, place.split(".")))
                for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                    walk.note((*path, key), parameter)
                scratch = non_persistent_buffers(module)
                for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
                    if key not in scratch:
                        walk.note((*path, key), buffer)
        for name, network in self.networks.items():
            yield from walk.of((f"networks[{name!r}]",), network, _nowhere)
        yield from walk.of(("recipe",), self.recipe, _nowhere)
        for name, optimizer in self.optimizers.items():
            yield from walk.own_of_optimizer((f"optimizers[{name!r}]",), optimizer)
        for name in sorted(self.user_modules):
            if name in sys.modules:
                yield from walk.of((f"module {_module_title(name)}",), sys.modules[name], _nowhere)


@dataclasses.dataclass
class _Place:
    path: Path_
    value: Any
    set: Callable[[Any], None]


class _Same:
    """Equal only to itself; it keeps its object alive, since an id alone could be reused."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


class _Shape(tuple):
    """Type and size of a container whose items are places of their own: a different size can't be restored.

    Of a dict the keys, and how many there are that are neither numbers nor texts: only those can't be set again.
    """

    def has_grown(self, before: Any) -> bool:
        """Whether it is the dict or list that it was and holds more."""
        if before is None or before[0] != self[0]:
            return False
        if self[0] == "list":
            return bool(before[1] <= self[1])
        return len(self) == 3 and before[1] == self[1] and before[2] <= self[2]


@dataclasses.dataclass
class _Is:
    """Which object a name stands for. first: the path by which it was met before, if it was."""

    value: Any
    first: Path_ | None
    owner: Path_ | None = None
    """Of a method: the path of its object."""

    @property
    def mark(self) -> Any:
        """Equal for what a restored run has in this place anyway: objects of one class, whose values are saved."""
        value = self.value
        if self.first is not None:
            return ("same", self.first)
        if isinstance(value, types.MethodType | partial):
            inner = value.__func__ if isinstance(value, types.MethodType) else value.func
            return (type(value), self.owner, _Is(inner, None).mark)
        if isinstance(value, types.FunctionType):
            return (value.__module__, value.__qualname__, value.__code__)
        if isinstance(value, (type, types.ModuleType, *_BUILT_IN)):
            return _Same(value)
        return type(value)


class _Walk:
    """Visits everything reachable once, in a fixed order."""

    def __init__(self, user_modules: set[str], objects: bool):
        self.user_modules, self.objects = user_modules, objects
        self.seen: dict[int, Path_] = {}
        self.first: dict[Path_, Any] = {}  # also keeps the objects alive: else an id could be reused

    def note(self, path: Path_, value: Any) -> None:
        """The first place of an object."""
        if id(value) not in self.seen:
            self.seen[id(value)], self.first[path] = path, value

    def _is(self, path: Path_, value: Any, put: Callable[[Any], None]) -> Iterator[_Place]:
        """What a name stands for, if it can be made to stand for another object."""
        first = None if isinstance(value, _BY_NAME) else self.seen.get(id(value))
        if put is not _nowhere and first != path:
            owner = self.seen.get(id(value.__self__)) if isinstance(value, types.MethodType) else None
            yield _Place((*path, IS), _Is(value, first, owner), put)

    def of(self, path: Path_, value: Any, put: Callable[[Any], None]) -> Iterator[_Place]:
        if len(path) > 60:
            return
        if _is_plain(value) and not isinstance(value, _arrays()):
            yield _Place(path, value, put)
            return
        if isinstance(value, tuple | frozenset) and len(value) <= MOST_ITEMS and _is_data(value):
            yield _Place(path, value, put)  # Python may have one object for all that are equal
            return
        is_leaf = isinstance(value, (*_STATEFUL, *_arrays()))
        # what is a library's own, such as a lock, is no state; and what a container holds is saved
        is_container = isinstance(value, dict | list | tuple | set | frozenset | deque)
        is_other = isinstance(value, (nn.Module, *_BY_NAME)) or not (is_container or _is_left_alone(type(value)))
        if id(value) in self.seen or (is_other and not is_leaf):
            yield from self._is(path, value, put)
        if id(value) in self.seen or self._is_only_read(value):
            return
        self.note(path, value)
        if is_leaf:
            yield _Place(path, value, put)
            return
        if isinstance(value, Optimizer):  # the recipe's own; those of the networks are in `seen` already
            yield _Place(path, value, _nowhere)
            yield from self.own_of_optimizer(path, value)
            return
        if self.objects:
            yield _Place(path, value, put)
        if isinstance(value, nn.Module):
            yield from self._module(path, value)
        elif isinstance(value, dict | list | tuple | set | frozenset | deque):
            yield from self._container(path, value, put)
        elif isinstance(value, types.ModuleType):
            if value.__name__ in self.user_modules:
                yield from self._attributes(path, value)
        elif isinstance(value, type):
            if value.__module__ in self.user_modules and not issubclass(value, enum.Enum):
                yield from self._attributes(path, value)
        elif isinstance(value, types.FunctionType):
            if value.__module__ in self.user_modules:
                yield from self._function(path, value)
        elif isinstance(value, types.MethodType):
            yield from self.of((*path, "__self__"), value.__self__, _nowhere)
            yield from self.of((*path, "__func__"), value.__func__, _nowhere)
        elif isinstance(value, partial):
            yield from self.of((*path, "func"), value.func, _nowhere)
            yield from self.of(
                (*path, "args"), value.args, lambda args: put(partial(value.func, *args, **value.keywords))
            )
            yield from self.of((*path, "keywords"), value.keywords, _nowhere)
        elif _is_left_alone(type(value)):
            return
        elif hasattr(value, "__dict__") or hasattr(type(value), "__slots__"):
            yield from self._attributes(path, value)
        elif hasattr(value, "__next__"):
            yield _Place(path, value, put)

    def _is_only_read(self, value: Any) -> bool:
        """Whether an object is a library's dataset."""
        return isinstance(value, torch.utils.data.Dataset) and type(value).__module__ not in self.user_modules

    def _module(self, path: Path_, module: nn.Module) -> Iterator[_Place]:
        """A module's mode, parameters, buffers, children, hooks, own attributes and class, in this order."""
        if isinstance(module, torch.jit.ScriptModule):
            return  # holds no Python objects
        yield _Place((*path, "training"), module.training, partial(_set_attribute, module, "training"))
        for name, parameter in module._parameters.items():
            if parameter is not None:
                # yields only the parameters of modules outside the networks: those inside are in `seen` already
                yield from self.of((*path, name), parameter, _nowhere)
                yield _Place(
                    (*path, f"{name}.requires_grad"), parameter.requires_grad, partial(_set_requires_grad, parameter)
                )
                for kind, hooks in hooks_of(parameter).items():
                    # checkpoints of earlier versions have this path
                    yield from self._hooks((*path, name, kind.replace("accumulate_grad_", "")), hooks)
        for name in sorted(module._buffers):
            buffers = module._buffers
            yield from self.of((*path, name), buffers.get(name), partial(_set_item, buffers, name))
        for name, child in module._modules.items():
            if child is not None:
                yield from self.of((*path, name), child, partial(_set_item, module._modules, name))
        for kind, hooks in hooks_of(module).items():
            yield from self._hooks((*path, kind), hooks)
        for name in sorted(vars(module).keys() - _OF_MODULES):
            yield from self._attribute(path, module, name)
        yield from self.of((*path, "__class__"), type(module), _nowhere)

    def _hooks(self, path: Path_, hooks: Mapping[int, Any]) -> Iterator[_Place]:
        """Which hooks there are, and their state, by position: their ids differ between processes."""
        yield _Place(
            (*path, "<hooks>"), _Shape(("hooks", *(_Is(hook, None).mark for hook in hooks.values()))), _nowhere
        )
        for place, hook in enumerate(hooks.values()):
            yield from self.of((*path, f"[{place}]"), hook, _nowhere)

    def own_of_optimizer(self, path: Path_, optimizer: Optimizer) -> Iterator[_Place]:
        """An optimizer's attributes other than its groups and its state, which are saved elsewhere."""
        for kind, hooks in hooks_of(optimizer).items():
            yield from self._hooks((*path, kind), hooks)
        for name in sorted(vars(optimizer).keys() - {"param_groups", "state", "defaults"}):
            if not name.startswith(("_optimizer_", "_zero_grad", "_warned", "_patch", "_need_", "_opt_called")):
                yield from self._attribute(path, optimizer, name)

    def _attributes(self, path: Path_, value: Any) -> Iterator[_Place]:
        names = set(getattr(value, "__dict__", {}))
        for kind in type(value).__mro__ if not isinstance(value, type) else ():
            slots = vars(kind).get("__slots__", ())
            names |= {slots} if isinstance(slots, str) else set(slots)
        for name in sorted(n for n in names if isinstance(n, str) and not n.startswith("__") and n not in _OF_RECIPES):
            yield from self._attribute(path, value, name)
        if not isinstance(value, type | types.ModuleType):
            yield from self.of((*path, "__class__"), type(value), _nowhere)

    def _attribute(self, path: Path_, owner: Any, name: str) -> Iterator[_Place]:
        try:
            value = vars(owner)[name] if name in getattr(owner, "__dict__", {}) else getattr(owner, name)
        except AttributeError:
            return
        if isinstance(value, staticmethod | classmethod | property):
            value = value.fget if isinstance(value, property) else value.__func__
        yield from self.of((*path, name), value, partial(_set_attribute, owner, name))

    def _function(self, path: Path_, function: types.FunctionType) -> Iterator[_Place]:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                held = cell.cell_contents
            except ValueError:  # not set yet
                continue
            yield from self.of((*path, f"<{name}>"), held, partial(_set_cell, cell))
        put = partial(_set_attribute, function, "__defaults__")
        yield from self.of((*path, "__defaults__"), function.__defaults__ or (), put)
        yield from self.of((*path, "__kwdefaults__"), function.__kwdefaults__ or {}, _nowhere)
        for name in sorted(vars(function)):
            yield from self._attribute(path, function, name)

    def _container(self, path: Path_, value: Any, put: Callable[[Any], None]) -> Iterator[_Place]:
        if len(value) > MOST_ITEMS or _is_data(value):
            yield _Place(path, value, put)
            return
        size: tuple[Any, ...] = (len(value),)
        if isinstance(value, dict):
            keys = frozenset(key for key in value if isinstance(key, int | str))
            size = (len(value) - len(keys), keys)
        yield _Place((*path, "<size>"), _Shape((type(value).__name__, *size)), _nowhere)
        items = value.items() if isinstance(value, dict) else enumerate(value) if not isinstance(value, set) else ()
        counts: dict[str, int] = {}
        parts = list(value) if isinstance(value, tuple) else []
        for key, item in items:
            title = repr(key) if isinstance(key, int | str) else type(key).__name__
            if not isinstance(key, int | str):  # such as parameters, which are told apart by their order
                counts[title] = number = counts.get(title, 0) + 1
                title += f" {number}" * (number > 1)
            setter = partial(_set_item, value, key)
            if isinstance(value, tuple):
                setter = partial(_set_in_tuple, value, parts, put, key)
            yield from self.of((*path, f"[{title}]"), item, setter)


def _modules_beside(recipe: Any) -> set[str]:
    """The names of loaded modules from the folder of the recipe's file, which it may have imported."""
    file = getattr(recipe, "file", None)
    if file is None:
        return set()
    names = set()
    folder = str(Path(file).parent) + os.sep
    for name, module in list(sys.modules.items()):  # some 2,500
        where = getattr(module, "__file__", None)
        if isinstance(where, str) and where.startswith(folder) and not name.startswith("nndist_recipe_"):
            inner = where[len(folder) :].removesuffix(".py").removesuffix(f"{os.sep}__init__")
            if os.sep not in inner or inner == name.replace(".", os.sep):  # or of a package there
                names.add(name)
    return names


_PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.device, Path)
_STATEFUL = (Tensor, torch.Generator, random.Random)
_BUILT_IN = (types.BuiltinFunctionType, types.BuiltinMethodType)
_BY_NAME = (type, types.FunctionType, *_BUILT_IN, types.ModuleType, types.MethodType, partial)
"""What is never one of several objects of a class, of which it matters which one it is."""
_LOOKED_INTO_TOO = ("torch.distributions.", "torch.amp.", "nndist.data.sets")
_LEFT_ALONE_TOO = {"torch", "nndist", "accelerate", "wandb", "tqdm", "matplotlib", "PIL"}
_LOOKED_INTO = {"builtins", "types", "collections", "functools", "itertools", "argparse", "__main__"}
"""Modules of the standard library in whose objects recipes keep values."""
_OF_MODULES = set(vars(nn.Module()))
_OF_RECIPES = {"_source", "_origin", "_names", "_beside", "_helpers", "_hints"}  # set on a class, and no state


def _is_left_alone(kind: type) -> bool:
    """Whether objects of a class are internal to a library."""
    if issubclass(kind, LRScheduler) or f"{kind.__module__}.".startswith(_LOOKED_INTO_TOO):
        return False
    library = kind.__module__.partition(".")[0]
    return library in _LEFT_ALONE_TOO or (library in sys.stdlib_module_names and library not in _LOOKED_INTO)


def _numpy() -> Any:
    return sys.modules.get("numpy")


def _is_plain(value: Any) -> bool:
    numpy = _numpy()
    return isinstance(value, (*_PLAIN, numpy.generic) if numpy else _PLAIN)


def _arrays() -> tuple[type, ...]:
    """NumPy's classes of what changes in place."""
    numpy = _numpy()
    return (numpy.ndarray, numpy.random.Generator, numpy.random.RandomState) if numpy else ()


def _objects_in(value: Any, depth: int = 0) -> Iterator[Any]:
    """The objects of which it may matter which one is in a place: those of a name, tensors and arrays at any depth."""
    if isinstance(value, _Is):
        if value.first is None and not isinstance(value.value, _BY_NAME):
            yield value.value
    elif isinstance(value, (Tensor, *_arrays())):
        yield value
    elif isinstance(value, list | tuple | deque | dict) and len(value) <= MOST_ITEMS and depth < MOST_DEPTH:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _objects_in(item, depth + 1)


def _memory_of(tensor: Tensor) -> int | None:
    """Where a tensor's numbers begin, the same for all views of them; None if there are none."""
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return None
    return local(tensor.detach()).untyped_storage().data_ptr() or None


def _without_is(path: Path_) -> Path_:
    return path[:-1] if path[-1] == IS else path


def _module_title(name: str) -> str:
    return name.removeprefix("nndist_recipe_")


def _is_data(value: Any) -> bool:
    """Whether a container holds only values that can be saved, at any depth."""
    try:
        encode(value, None)
    except Unsavable:
        return False
    return True


def _mark(value: Any) -> Any:
    """A fingerprint of a value, which differs once the value has changed, even within the same object."""
    numpy = _numpy()
    if isinstance(value, _Is):
        return value.mark
    if isinstance(value, Tensor):
        if value.layout == torch.strided and value.device.type != "meta":
            # by content: what writes to `.data` or through NumPy leaves torch's version counter as it is
            with contextlib.suppress(RuntimeError, NotImplementedError):  # quantised, nested
                return (value.dtype, value.shape, _checksum(value))
        return (_Same(value), value._version)
    if isinstance(value, _Shape):
        return tuple(value)
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if numpy and isinstance(value, numpy.ndarray):
        return _Same(value) if value.dtype.hasobject else (value.dtype, value.shape, zlib.crc32(value.tobytes()))
    if hasattr(value, "__next__"):
        return repr(value) if isinstance(value, itertools.count) else object()  # position unknown: counts as changed
    if hasattr(value, "__len__") and len(value) > MOST_ITEMS:
        return (_Same(value), len(value))
    tensors: dict[str, Tensor] = {}
    try:
        text = repr(encode(value, tensors))
    except Unsavable:
        return (_Same(value), repr(type(value)))
    return (text, tuple((name, _mark(tensor)) for name, tensor in tensors.items()))


def _checksum(tensor: Tensor) -> int:
    """A hash of a tensor's bits: of 2 GB a second on a core; on its device if that is a GPU."""
    plain = local(tensor.detach()).contiguous().view(-1).view(torch.uint8)
    if plain.device.type == "cpu" or len(plain) % 4 or len(plain) < 1 << 16:
        return zlib.crc32(plain.cpu().numpy().data) if len(plain) else 0
    return int(fingerprint((plain.clone() if plain.storage_offset() % 4 else plain).view(torch.int32)))


def _nowhere(value: Any) -> None:
    """The setter of a place whose object stays: its contents were restored."""


def _set_attribute(owner: Any, name: str, value: Any) -> None:
    if dataclasses.is_dataclass(owner) and getattr(type(owner), "__dataclass_params__", None) is not None:
        object.__setattr__(owner, name, value)  # works on frozen ones too
    else:
        setattr(owner, name, value)


def _set_requires_grad(parameter: nn.Parameter, value: bool) -> None:
    parameter.requires_grad_(value)


def _set_cell(cell: Any, value: Any) -> None:
    cell.cell_contents = value


def _set_item(owner: Any, key: Any, value: Any) -> None:
    if not isinstance(owner, tuple | frozenset):
        owner[key] = value


def _set_in_tuple(value: tuple[Any, ...], parts: list[Any], put: Callable[[Any], None], key: int, item: Any) -> None:
    """Puts another tuple in the place of one: with this item, and those that were set before."""
    parts[key] = item
    put(type(value)._make(parts) if hasattr(value, "_make") else type(value)(parts))


def _set_new(owner: Any, name: str, value: Any) -> None:
    """Sets a value where there was none at the start: an attribute, or an item of a dict."""
    if name.startswith("["):
        if isinstance(owner, list) and _key(name) == len(owner):
            owner.append(value)
            return
        if not isinstance(owner, dict):
            raise LookupError
        owner[_key(name)] = value
    elif name.startswith("<"):
        raise LookupError
    else:
        _set_attribute(owner, name, value)


def _key(name: str) -> Any:
    import ast

    return ast.literal_eval(name[1:-1])
