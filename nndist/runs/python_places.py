"""What can be reached from a recipe, its networks and its modules: places and their paths.

`Walk` visits every object once, in a fixed order, and gives a `Place` for each value that code may change.
"""

from __future__ import annotations

import dataclasses
import enum
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..distributed.batch_norm import OVER_PROCESSES
from ..torch_internals import OF_OPTIMIZERS, hooks_of
from .python_marks import BUILT_IN, BY_NAME, CONTAINERS, Is, PlacePath, Same, Shape, arrays, is_data, is_plain, numpy_
from .python_setters import nowhere, set_attribute, set_cell, set_in_tuple, set_item, set_requires_grad
from .python_values import MOST_ITEMS, plain_bytes

MOST_DATA_BYTES, MOST_EXAMPLES = 1 << 24, 1000
"""Of a tensor, or of the items of a container, that is looked at within a set of examples."""
IS = "<is>"
"""After a path: which object it stands for, apart from what that object holds."""
OF_SET = "[one of them: "
"""Begins the last part of the path of a set's item, which only this process can find again."""

_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
_STATEFUL = (Tensor, torch.Generator, random.Random)
_LOOKED_INTO_TOO = (
    "torch.distributions.",
    "torch.amp.",
    "torch.utils.data.dataset.",
    "nndist.data.sets",
    "nndist.data.parts",
    "nndist.data.mixed",
)
_LEFT_ALONE_TOO = {"torch", "nndist", "accelerate", "wandb", "tqdm", "matplotlib", "PIL"}
_LOOKED_INTO = {
    "builtins",
    "types",
    "collections",
    "functools",
    "itertools",
    "argparse",
    "queue",
    "weakref",
    "__main__",
}
"""Modules of the standard library in whose objects recipes keep values."""
_OF_MODULES = {*vars(nn.Module()), OVER_PROCESSES}
_OF_RECIPES = {"_source", "_origin", "_names", "_beside", "_helpers", "_hints"}  # set on a class, and no state


@dataclasses.dataclass
class Place:
    path: PlacePath
    value: Any
    set: Callable[[Any], None]


def without_is(path: PlacePath) -> PlacePath:
    return path[:-1] if path[-1] == IS else path


class Walk:
    """Visits everything reachable once, in a fixed order."""

    def __init__(self, user_modules: set[str], objects: bool):
        self.user_modules, self.objects = user_modules, objects
        self.in_data = False  # whether it looks into a set of examples
        self.seen: dict[int, PlacePath] = {}
        self.first: dict[PlacePath, Any] = {}  # also keeps the objects alive: else an id could be reused

    def note(self, path: PlacePath, value: Any) -> None:
        """The first place of an object."""
        if id(value) not in self.seen:
            self.seen[id(value)], self.first[path] = path, value

    def _is(self, path: PlacePath, value: Any, put: Callable[[Any], None]) -> Iterator[Place]:
        """What a name stands for, if it can be made to stand for another object."""
        first = None if isinstance(value, BY_NAME) else self.seen.get(id(value))
        if put is not nowhere and first != path:
            owner = self.seen.get(id(value.__self__)) if isinstance(value, types.MethodType) else None
            yield Place((*path, IS), Is(value, first, owner), put)

    def of(self, path: PlacePath, value: Any, put: Callable[[Any], None]) -> Iterator[Place]:
        if len(path) > 60:
            return
        if is_plain(value) and not isinstance(value, arrays()):
            yield Place(path, value, put)
            return
        if self.in_data and (_nbytes(value) > MOST_DATA_BYTES or _is_examples(value)):
            return  # what is trained on
        if isinstance(value, tuple | frozenset) and len(value) <= MOST_ITEMS and is_data(value):
            yield Place(path, value, put)  # Python may have one object for all that are equal
            return
        is_leaf = isinstance(value, (*_STATEFUL, *arrays()))
        # what is a library's own, such as a lock, is no state; and what a container holds is saved
        is_container = isinstance(value, CONTAINERS)
        is_other = isinstance(value, (nn.Module, *BY_NAME)) or not (is_container or _is_left_alone(type(value)))
        if id(value) in self.seen or (is_other and not is_leaf):
            yield from self._is(path, value, put)
        if id(value) in self.seen:
            if isinstance(value, Tensor) and self.seen[id(value)] == path:  # of a network: its numbers are saved there
                yield from self._attributes_of_tensor(path, value)
            return
        self.note(path, value)
        if is_leaf:
            yield Place(path, value, put)
            if isinstance(value, Tensor):
                yield from self._attributes_of_tensor(path, value)
                if value.is_leaf and value.grad is not None:
                    yield Place((*path, "grad"), value.grad, partial(set_attribute, value, "grad"))
            return
        if isinstance(value, Optimizer):  # the recipe's own; those of the networks are in `seen` already
            yield Place(path, value, nowhere)
            yield from self.own_of_optimizer(path, value)
            return
        if self.objects:
            yield Place(path, value, put)
        yield from self._within(path, value, put)

    def _within(self, path: PlacePath, value: Any, put: Callable[[Any], None]) -> Iterator[Place]:
        """What an object holds; of one that can't be looked into, which one it is."""
        if isinstance(value, nn.Module):
            yield from self._module(path, value)
        elif isinstance(value, CONTAINERS):
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
            yield from self.of((*path, "__self__"), value.__self__, nowhere)
            yield from self.of((*path, "__func__"), value.__func__, nowhere)
        elif isinstance(value, partial):
            yield from self.of((*path, "func"), value.func, nowhere)
            yield from self.of(
                (*path, "args"), value.args, lambda args: put(partial(value.func, *args, **value.keywords))
            )
            yield from self.of((*path, "keywords"), value.keywords, nowhere)
        elif isinstance(value, BUILT_IN):
            return
        elif self._is_dataset(path, value):
            before, self.in_data = self.in_data, True
            yield from self._attributes(path, value)
            self.in_data = before
        elif _is_left_alone(type(value)):
            if type(value).__module__.partition(".")[0] in sys.stdlib_module_names:
                yield Place(path, value, put)
        elif hasattr(value, "__dict__") or hasattr(type(value), "__slots__"):
            yield from self._attributes(path, value)
        else:
            yield Place(path, value, put)

    def _is_dataset(self, path: PlacePath, value: Any) -> bool:
        """Whether an object is a set of examples, of which only what is small is looked at."""
        is_torchs = isinstance(value, torch.utils.data.Dataset)
        return is_torchs or (
            path[0].startswith("data.") and hasattr(value, "__getitem__" if len(path) > 1 else "batches")
        )

    def _attributes_of_tensor(self, path: PlacePath, tensor: Tensor) -> Iterator[Place]:
        """What code keeps on a tensor."""
        if type(tensor) in _TENSORS or type(tensor).__module__ in self.user_modules:
            for name in sorted(vars(tensor)):
                yield from self._attribute(path, tensor, name)

    def _module(self, path: PlacePath, module: nn.Module) -> Iterator[Place]:
        """A module's mode, parameters, buffers, children, hooks, own attributes and class, in this order."""
        if isinstance(module, torch.jit.ScriptModule):
            return  # holds no Python objects
        yield Place((*path, "training"), module.training, partial(set_attribute, module, "training"))
        for name, parameter in module._parameters.items():
            if parameter is not None:
                # the numbers only of modules outside the networks: those inside are in `seen` already
                put = nowhere if path[0].startswith("networks[") else partial(set_item, module._parameters, name)
                yield from self.of((*path, name), parameter, put)
                yield Place(
                    (*path, f"{name}.requires_grad"), parameter.requires_grad, partial(set_requires_grad, parameter)
                )
                for kind, hooks in hooks_of(parameter).items():
                    # checkpoints of earlier versions have this path
                    yield from self._hooks((*path, name, kind.replace("accumulate_grad_", "")), hooks)
        for name in sorted(module._buffers):
            buffers = module._buffers
            yield from self.of((*path, name), buffers.get(name), partial(set_item, buffers, name))
        yield Place((*path, "<modules>"), Shape((dict, 0, tuple(module._modules))), nowhere)
        for name, child in module._modules.items():
            if child is not None:
                yield from self.of((*path, name), child, partial(set_item, module._modules, name))
        for kind, hooks in hooks_of(module).items():
            yield from self._hooks((*path, kind), hooks)
        for name in sorted(vars(module).keys() - _OF_MODULES):
            yield from self._attribute(path, module, name)
        yield from self.of((*path, "__class__"), type(module), nowhere)

    def _hooks(self, path: PlacePath, hooks: Mapping[int, Any]) -> Iterator[Place]:
        """Which hooks there are, and their state, by position: their ids differ between processes."""
        yield Place((*path, "<hooks>"), Shape(("hooks", *(Is(hook, None).mark for hook in hooks.values()))), nowhere)
        for place, hook in enumerate(hooks.values()):
            yield from self.of((*path, f"[{place}]"), hook, nowhere)

    def own_of_optimizer(self, path: PlacePath, optimizer: Optimizer) -> Iterator[Place]:
        """An optimizer's attributes other than its groups and its state, which are saved elsewhere."""
        for kind, hooks in hooks_of(optimizer).items():
            yield from self._hooks((*path, kind), hooks)
        for name in sorted(vars(optimizer).keys() - OF_OPTIMIZERS - {"param_groups", "state"}):
            yield from self._attribute(path, optimizer, name)

    def _attributes(self, path: PlacePath, value: Any) -> Iterator[Place]:
        names = set(getattr(value, "__dict__", {}))
        for kind in type(value).__mro__ if not isinstance(value, type) else ():
            slots = vars(kind).get("__slots__", ())
            names |= {slots} if isinstance(slots, str) else set(slots)
        for name in sorted(n for n in names if isinstance(n, str) and not n.startswith("__") and n not in _OF_RECIPES):
            yield from self._attribute(path, value, name)
        if not isinstance(value, type | types.ModuleType):
            yield from self.of((*path, "__class__"), type(value), nowhere)

    def _attribute(self, path: PlacePath, owner: Any, name: str) -> Iterator[Place]:
        try:
            value = vars(owner)[name] if name in getattr(owner, "__dict__", {}) else getattr(owner, name)
        except AttributeError:
            return
        if isinstance(value, staticmethod | classmethod | property):
            value = value.fget if isinstance(value, property) else value.__func__
        yield from self.of((*path, name), value, partial(set_attribute, owner, name))

    def _function(self, path: PlacePath, function: types.FunctionType) -> Iterator[Place]:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                held = cell.cell_contents
            except ValueError:  # not set yet
                continue
            yield from self.of((*path, f"<{name}>"), held, partial(set_cell, cell))
        put = partial(set_attribute, function, "__defaults__")
        yield from self.of((*path, "__defaults__"), function.__defaults__ or (), put)
        yield from self.of((*path, "__kwdefaults__"), function.__kwdefaults__ or {}, nowhere)
        for name in sorted(vars(function)):
            yield from self._attribute(path, function, name)

    def _container(self, path: PlacePath, value: Any, put: Callable[[Any], None]) -> Iterator[Place]:
        if len(value) > MOST_ITEMS or is_data(value):
            yield Place(path, value, put)
            return
        size: tuple[Any, ...] = (len(value),)
        if isinstance(value, dict):
            keys = tuple(key for key in value if isinstance(key, int | str))
            size = (len(value) - len(keys), keys)
        if isinstance(value, set | frozenset):  # in an order that is another in each process
            items = sorted(value, key=id)
            yield Place((*path, "<size>"), Shape((type(value), *map(Same, items))), nowhere)
            for item in items:
                yield from self.of((*path, f"{OF_SET}{id(item)}]"), item, nowhere)
            return
        yield Place((*path, "<size>"), Shape((type(value), *size)), nowhere)
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        counts: dict[str, int] = {}
        parts = list(value) if isinstance(value, tuple) else []
        for key, item in pairs:
            title = repr(key) if isinstance(key, int | str) else type(key).__name__
            if not isinstance(key, int | str):  # such as parameters, which are told apart by their order
                counts[title] = number = counts.get(title, 0) + 1
                title += f" {number}" * (number > 1)
            setter = partial(set_item, value, key)
            if isinstance(value, tuple):
                setter = partial(set_in_tuple, value, parts, put, key)
            yield from self.of((*path, f"[{title}]"), item, setter)


def _is_left_alone(kind: type) -> bool:
    """Whether objects of a class are internal to a library; what is in a threading.local belongs to the process."""
    if issubclass(kind, LRScheduler) or f"{kind.__module__}.".startswith(_LOOKED_INTO_TOO):
        return False
    library = kind.__module__.partition(".")[0]
    return library in _LEFT_ALONE_TOO or (library in sys.stdlib_module_names and library not in _LOOKED_INTO)


def _nbytes(value: Any) -> int:
    """Of a tensor or an array; a file's are not counted."""
    numpy = numpy_()
    if numpy and isinstance(value, numpy.memmap):
        return MOST_DATA_BYTES + 1
    return int(value.nbytes) if isinstance(value, (Tensor, numpy.ndarray) if numpy else Tensor) else 0


def _is_examples(value: Any) -> bool:
    """Whether a container is one of examples, such as tensors, and not of names or numbers."""
    if not isinstance(value, CONTAINERS):
        return False
    if len(value) > MOST_EXAMPLES:
        return len(value) > MOST_ITEMS or plain_bytes(value) is None
    items = list(value.values() if isinstance(value, dict) else value)
    return sum(map(_nbytes, items)) > MOST_DATA_BYTES
