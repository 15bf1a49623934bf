"""The Python state that training changes: counters, flags, queues, generators; as JSON and tensors, and back.

A recipe is ordinary Python, and what it does may depend on more than the weights: a call counter, an annealed
temperature, a queue of past outputs, a random generator, a frozen layer. Everything reachable from the recipe, its
networks and its modules is compared with its value at the start; what has changed is saved, and restored in the same
places of a freshly built recipe and networks. What can't be saved without pickle is reported by name.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import os
import sys
import types
import weakref
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..torch_internals import non_persistent_buffers
from .network_state import own_tensors
from .python_marks import BY_NAME, Is, PlacePath, Shape, mark_of, memory_of, objects_in
from .python_places import IS, OF_SET, Place, Walk, without_is
from .python_setters import is_new_name, nowhere, set_new, set_shape
from .python_values import Held, Json, Unsavable, decode, encode, module_title, plain_bytes

MOST_KEPT = 10_000
"""Numbers of one value that are remembered as they were at the start, beside a mark."""
LIBRARIES = ("torch.nn.functional", "torch", "torch.special", "math")
"""Whose functions an attribute may be set to in training."""


@dataclasses.dataclass
class Change:
    """A place whose value has changed since the start: its path, and its current value as JSON and tensors."""

    path: PlacePath
    value: Json
    tensors: dict[str, Tensor]

    @property
    def name(self) -> str:
        return readable(self.path)


def _owner_in(path: PlacePath) -> PlacePath:
    """The object that a place is about."""
    path = path[: next((at for at, part in enumerate(path) if part.startswith(OF_SET)), None)]
    return path[:-1] if path[-1] in (IS, "<hooks>", "<size>", "<modules>") else path


def _is_within(path: PlacePath, others: Collection[PlacePath]) -> bool:
    """Whether a path leads through one of the others."""
    return any(path[:end] in others for end in range(1, len(path)))


def readable(path: PlacePath) -> str:
    """A path in Python's notation, for people."""
    parts = (part if part.startswith(("[", ".")) else f".{part}" for part in _owner_in(path))
    return "".join(parts).lstrip(".")


class PythonState:
    """The values of all objects of a recipe and its networks at the time this was created.

    functions: by name, those that the recipe gave away, such as its data's `prepare`, which may keep something, too.
    """

    def __init__(
        self,
        recipe: Any,
        networks: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer] | None = None,
        functions: Mapping[str, Any] | None = None,
    ):
        self.recipe, self.networks, self.optimizers = recipe, networks, optimizers or {}
        self.functions = functions or {}
        self._num_modules, self._beside = 0, set[str]()
        self.before: dict[PlacePath, Any] = {}
        self._made: set[PlacePath] = set()
        self._initial: dict[PlacePath, Change] = {}
        self._started: dict[int, tuple[PlacePath, weakref.ref[Any]]] = {}  # by id: where an object was at the start
        self.begin()

    def begin(self) -> None:
        """Records places not seen before, such as an optimizer's attributes, with their current values."""
        for place in self._places():
            if place.path in self._made:
                continue
            for value in objects_in(place.value):
                if id(value) not in self._started or self._started[id(value)][1]() is not value:
                    with contextlib.suppress(TypeError):  # no weak references to its class
                        self._started[id(value)] = (place.path, weakref.ref(value))
            # the making of an optimizer or lazy layer may change its class and hooks
            if isinstance(place.value, Is) or place.path[-1] == "<hooks>":
                self.before[place.path] = mark_of(place.value)
            elif place.path not in self.before:
                self.before[place.path] = mark_of(place.value)
                self._keep(place)

    def _keep(self, place: Place) -> None:
        """Remembers the value of a place at the start, if it isn't a large one."""
        tensors: dict[str, Tensor] = {}
        if isinstance(place.value, list | dict | set | tuple) and len(plain_bytes(place.value) or b"") > 10 * MOST_KEPT:
            return
        with contextlib.suppress(Unsavable):
            if isinstance(place.value, Shape):
                self._initial[place.path] = Change(place.path, place.value.said(tuple(place.value)), {})
            elif not isinstance(place.value, Tensor) or place.value.numel() <= MOST_KEPT:
                value = self._encoded(place.value, tensors)
                if sum(tensor.numel() for tensor in tensors.values()) <= MOST_KEPT:
                    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
                    self._initial[place.path] = Change(place.path, value, copies)

    def undone(self, changes: list[Change]) -> tuple[list[Change], list[str]]:
        """What gives the places of these changes the values of the start; and the names of those it isn't known of."""
        found, unknown = [], []
        replaced = {_owner_in(one.path) for one in changes if one.path[-1] == IS and self._is_at_start(one.path)}
        for change in changes:
            if change.path[-1] == IS and _owner_in(change.path) in replaced:
                found.append(Change(change.path, {"from": list(_owner_in(change.path))}, {}))
            elif change.path in self._initial:
                found.append(self._initial[change.path])
            elif not _is_within(change.path, replaced):
                unknown.append(change.name)
        return found, unknown

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
        """What has changed since the start, and the names of changed values that can't be saved.

        Every change is in one of the two: what is neither saved nor named would be lost in silence.
        """
        found: list[Change] = []
        lost: set[PlacePath] = set()
        visited: set[PlacePath] = set()
        walk = Walk(self.user_modules, objects=False)
        memory = self._memory_of_networks()
        for place in self._places(walk):
            visited.add(place.path)
            if self._is_as_before(place, walk):
                continue
            try:
                found.append(self._change(place, walk, memory))
            except Unsavable:
                lost.add(_owner_in(place.path))
        found += [Change(path, {"deleted": True}, {}) for path in sorted(self._deleted(visited, walk))]
        outermost = {path for path in lost if not _is_within(path, lost)}
        # of what is lost nothing is saved: it would be restored by halves
        return [one for one in found if not _is_within((*one.path, ""), lost)], sorted(map(readable, outermost))

    def _is_as_before(self, place: Place, walk: Walk) -> bool:
        """Whether a place has the value of the start, or is restored with others."""
        path, value = place.path, place.value
        if isinstance(value, Is) and self._elsewhere(place) is not None:
            return False
        if path in self.before and self.before[path] == mark_of(value):
            return True
        if isinstance(value, Shape):  # new items are places of their own
            return value.has_grown(self.before.get(path)) or self._is_filled(path, walk)
        if isinstance(value, Is) and path not in self.before and path[0].startswith("module "):
            self.before[path] = mark_of(value)  # as a late import has it
            return True
        return False

    def _memory_of_networks(self) -> dict[int, set[int]]:
        """Where the numbers of the networks are; and by id the tensors there that no checkpoint has as weights."""
        memory: dict[int | None, set[int]] = {}
        for buffer in (buffer for network in self.networks.values() for buffer in network.buffers()):
            memory.setdefault(memory_of(buffer), set()).add(id(buffer))
        for weight in (weight for network in self.networks.values() for weight in own_tensors(network).values()):
            memory[memory_of(weight)] = set()
        return {place: others for place, others in memory.items() if place is not None}

    def _change(self, place: Place, walk: Walk, memory: Mapping[int, set[int]]) -> Change:
        """The current value of a place; raises Unsavable. memory: see _memory_of_networks."""
        path, value = place.path, place.value
        if any(part.startswith(OF_SET) for part in path):
            raise Unsavable
        if isinstance(value, Shape):
            return Change(path, value.said(self.before.get(path)), {})
        if isinstance(value, Is) and (start := self._elsewhere(place)) is not None:
            return Change(path, {"from": list(start)}, {})
        if path not in self.before and not is_new_name(without_is(path)[-1]):
            raise Unsavable  # a key that only this process has
        if isinstance(value, Is):
            return Change(path, self._said(value, walk), {})
        if isinstance(value, Tensor) and not self._is_original(value):
            others = memory.get(memory_of(value) or 0)
            if others is not None and id(value) not in others:
                raise Unsavable  # a view of weights, which would come back as a copy
        tensors = Held(self._is_original)
        return Change(path, self._encoded(value, tensors), tensors)

    def _is_filled(self, path: PlacePath, walk: Walk) -> bool:
        """Whether a container of what can't be encoded is new and comes with its owner, or was empty at the start."""
        if path in self.before:
            return False
        if path[-1] != "<size>" or self._is_of_late_import(path):
            return True
        value = walk.first[path[:-1]]
        if path[:-1] not in self.before or not isinstance(value, list | dict | deque):
            return False
        empty = copy.copy(value)
        empty.clear()
        return bool(self.before[path[:-1]] == mark_of(empty))

    def _is_of_late_import(self, path: PlacePath) -> bool:
        return path[0].startswith("module ") and not any(start[0] == path[0] for start in self.before)

    def _deleted(self, visited: set[PlacePath], walk: Walk) -> set[PlacePath]:
        """The attributes that were there at the start, of objects that are where they were, and no longer are."""
        paths = {path[:end] for path in self.before.keys() - visited for end in range(1, len(path) + 1)}
        return {path for path in paths if path[:-1] in walk.first and _is_missing(walk.first[path[:-1]], path[-1])}

    def _is_original(self, value: Any) -> bool:
        """Whether an object was there at the start, in whichever place."""
        return id(value) in self._started and self._started[id(value)][1]() is value

    def _elsewhere(self, place: Place) -> PlacePath | None:
        """The place at the start of an object that a name stands for now, if it was another one."""
        held = place.value
        if held.first is not None or isinstance(held.value, BY_NAME) or not self._is_original(held.value):
            return None
        start = without_is(self._started[id(held.value)][0])
        return None if start == without_is(place.path) else start

    def _is_at_start(self, path: PlacePath) -> bool:
        with contextlib.suppress(LookupError):
            return self._at_start(without_is(path)) is not None
        return False

    def _at_start(self, path: PlacePath) -> Any:
        """The object that was in a place at the start of this process; raises LookupError."""
        for place, reference in self._started.values():
            if without_is(place) == path and (value := reference()) is not None:
                return value
        raise LookupError

    def _encoded(self, value: Any, tensors: dict[str, Tensor]) -> Json:
        """A value as JSON and tensors; raises Unsavable."""
        if not isinstance(value, nn.Parameter):
            return encode(value, tensors)
        return {**encode(value.detach(), tensors), "parameter": value.requires_grad}

    def _said(self, held: Is, walk: Walk) -> Json:
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
                return {"named": [module_title(name), short]}
        raise Unsavable

    def _meant(self, said: Json, walk: Walk) -> Any:
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
            if module_title(name) == title and name in sys.modules:
                return vars(sys.modules[name])[short]
        raise LookupError

    def trained_outside(self) -> list[Tensor]:
        """Tensors outside the networks that take gradients, which nothing sums over the processes."""
        own = {id(parameter) for network in self.networks.values() for parameter in network.parameters()}
        tensors = [place.value for place in self._places() if isinstance(place.value, Tensor)]
        return [t for t in tensors if t.is_leaf and t.requires_grad and id(t) not in own]

    def marks_of(self, name: str, value: Any) -> dict[PlacePath, Any]:
        """A mark of each value that an object holds, which differs once the value has changed."""
        places = Walk(self.user_modules, objects=False).of((name,), value, nowhere)
        return {place.path: mark_of(place.value) for place in places}

    def values(self, paths: Collection[tuple[str, ...]]) -> list[Change]:
        """The values of these places, changed or not, as far as they exist and can be saved."""
        found: list[Change] = []
        for place in self._places():
            if place.path in paths and not isinstance(place.value, Shape | Is):
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
        walk = Walk(self.user_modules, objects=False)
        list(self._places(walk))
        for change in changes:
            if change.path[-1] in ("<size>", "<modules>"):
                try:
                    set_shape(walk.first[change.path[:-1]], change.value)
                except LookupError:
                    missing.append(change.name)
        walk = Walk(self.user_modules, objects=False)
        places = {place.path: place for place in self._places(walk)}
        for change in changes:
            if change.path[-1] in (IS, "<size>", "<modules>"):
                continue
            try:
                if isinstance(change.value, dict) and "deleted" in change.value:
                    _delete(walk.first[change.path[:-1]], change.path[-1])
                    continue
                if change.path not in places:  # a restored value may contain it, or it was created later
                    walk = Walk(self.user_modules, objects=True)
                    places = {place.path: place for place in self._places(walk)}
                if change.path in places:
                    place = places[change.path]
                    place.set(decode(change.value, change.tensors, like=place.value))
                else:
                    set_new(
                        walk.first[change.path[:-1]], change.path[-1], decode(change.value, change.tensors, like=None)
                    )
            except (LookupError, AttributeError, TypeError, ValueError):
                missing.append(change.name)
        return missing + self._set_names([change for change in names if {"same", "method"} & change.value.keys()])

    def _set_names(self, changes: list[Change]) -> list[str]:
        """Makes names stand for what they stood for; returns those whose object or place no longer exists."""
        missing = []
        if changes:
            walk = Walk(self.user_modules, objects=True)
            places = {place.path: place for place in self._places(walk)}
            for change in changes:
                owner, name = change.path[:-2], change.path[-2]
                try:
                    meant = self._meant(change.value, walk)
                    if (place := places.get(change.path) or places.get(change.path[:-1])) is not None:
                        place.set(meant)
                    else:
                        set_new(places[owner].value, name, meant)
                except (LookupError, AttributeError, TypeError, ValueError):
                    missing.append(change.name)
        return missing

    def _import(self, path: PlacePath) -> None:
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

    def _places(self, walk: Walk | None = None, *, objects: bool = False) -> Iterator[Place]:
        walk = walk or Walk(self.user_modules, objects)
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
            yield from walk.of((f"networks[{name!r}]",), network, nowhere)
        yield from walk.of(("recipe",), self.recipe, nowhere)
        for name, function in self.functions.items():
            yield from walk.of((name,), function, nowhere)
        for name, optimizer in self.optimizers.items():
            yield from walk.own_of_optimizer((f"optimizers[{name!r}]",), optimizer)
        for name in sorted(self.user_modules):
            if name in sys.modules:
                yield from walk.of((f"module {module_title(name)}",), sys.modules[name], nowhere)


def _is_missing(owner: Any, name: str) -> bool:
    """Whether an object lacks an attribute of that name."""
    if not name.isidentifier() or isinstance(owner, (dict, list, tuple, set, frozenset)):
        return False
    if isinstance(owner, nn.Module) and any(name in of for of in (owner._parameters, owner._buffers, owner._modules)):
        return owner._parameters.get(name, name) is None
    if isinstance(owner, Tensor) and name == "grad":
        return owner.grad is None
    return name not in getattr(owner, "__dict__", ()) and not hasattr(owner, name)


def _delete(owner: Any, name: str) -> None:
    """Removes an attribute, if there is one."""
    if isinstance(owner, nn.Module) and name in owner._parameters:
        owner._parameters[name] = None
    elif isinstance(owner, Tensor) and name == "grad":
        owner.grad = None
    elif not _is_missing(owner, name):
        delattr(owner, name)


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
