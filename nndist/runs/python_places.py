"""What can be reached from a recipe, its networks and its modules: places, their paths, and marks of their values.

`Walk` visits every object once, in a fixed order, and gives a `Place` for each value that code may change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import itertools
import random
import sys
import types
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..distributed.blocks import local
from ..torch_internals import hooks_of
from .fingerprints import fingerprint
from .python_values import MOST_DEPTH, MOST_ITEMS, Unsavable, decode, encode, plain_bytes

PlacePath = tuple[str, ...]
MOST_DATA_BYTES, MOST_EXAMPLES = 1 << 24, 1000
"""Of a tensor, or of the items of a container, that is looked at within a set of examples."""
IS = "<is>"
"""After a path: which object it stands for, apart from what that object holds."""
OF_SET = "[one of them: "
"""Begins the last part of the path of a set's item, which only this process can find again."""


@dataclasses.dataclass
class Place:
    path: PlacePath
    value: Any
    set: Callable[[Any], None]


class _Same:
    """Equal only to itself; it keeps its object alive, since an id alone could be reused."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


class Shape(tuple):
    """Class and size of a container whose items are places of their own.

    Of a list or deque how many items, of a dict how many keys that are neither numbers nor texts, and the others in
    order: those can be set again. Of a set which items it holds, and of hooks which functions, which can't.
    """

    def has_grown(self, before: Any) -> bool:
        """Whether it is the dict or list that it was and holds more, at its end."""
        if before is None or before[0] is not self[0]:
            return False
        if self._is_list():
            return bool(before[1] <= self[1])
        return self._is_dict() and before[1] == self[1] and before[2] == self[2][: len(before[2])]

    def said(self, before: Any) -> dict[str, Any]:
        """What remains, as JSON: how many items, or the keys in order; raises Unsavable if it can't be restored."""
        if before is not None and before[0] is self[0]:
            if self._is_list():
                return {"length": self[1]}
            if self._is_dict() and self[1] == before[1]:
                return {"keys": encode(list(self[2]), None)}
        raise Unsavable

    def _is_list(self) -> bool:
        return isinstance(self[0], type) and issubclass(self[0], list | deque)

    def _is_dict(self) -> bool:
        return isinstance(self[0], type) and issubclass(self[0], dict)


@dataclasses.dataclass
class Is:
    """Which object a name stands for. first: the path by which it was met before, if it was."""

    value: Any
    first: PlacePath | None
    owner: PlacePath | None = None
    """Of a method: the path of its object."""

    @property
    def mark(self) -> Any:
        """Equal for what a restored run has in this place anyway: objects of one class, whose values are saved."""
        value = self.value
        if self.first is not None:
            return ("same", self.first)
        if isinstance(value, types.MethodType | partial):
            inner = value.__func__ if isinstance(value, types.MethodType) else value.func
            return (type(value), self.owner, Is(inner, None).mark)
        if isinstance(value, types.FunctionType):
            return (value.__module__, value.__qualname__, value.__code__)
        if isinstance(value, (type, types.ModuleType, *_BUILT_IN)):
            return _Same(value)
        return type(value)


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
        if is_plain(value) and not isinstance(value, _arrays()):
            yield Place(path, value, put)
            return
        if self.in_data and (_nbytes(value) > MOST_DATA_BYTES or _is_examples(value)):
            return  # what is trained on
        if isinstance(value, tuple | frozenset) and len(value) <= MOST_ITEMS and is_data(value):
            yield Place(path, value, put)  # Python may have one object for all that are equal
            return
        is_leaf = isinstance(value, (*_STATEFUL, *_arrays()))
        # what is a library's own, such as a lock, is no state; and what a container holds is saved
        is_container = isinstance(value, _CONTAINERS)
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
        elif isinstance(value, _CONTAINERS):
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
        elif isinstance(value, _BUILT_IN):
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
                    (*path, f"{name}.requires_grad"), parameter.requires_grad, partial(_set_requires_grad, parameter)
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
        for name in sorted(vars(optimizer).keys() - {"param_groups", "state", "defaults"}):
            if not name.startswith(("_optimizer_", "_zero_grad", "_warned", "_patch", "_need_", "_opt_called")):
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
            yield from self.of((*path, f"<{name}>"), held, partial(_set_cell, cell))
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
            yield Place((*path, "<size>"), Shape((type(value), *map(_Same, items))), nowhere)
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
                setter = partial(_set_in_tuple, value, parts, put, key)
            yield from self.of((*path, f"[{title}]"), item, setter)


_PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.device, Path)
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
_STATEFUL = (Tensor, torch.Generator, random.Random)
_BUILT_IN = (types.BuiltinFunctionType, types.BuiltinMethodType)
BY_NAME = (type, types.FunctionType, *_BUILT_IN, types.ModuleType, types.MethodType, partial)
"""What is never one of several objects of a class, of which it matters which one it is."""
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
_OF_MODULES = set(vars(nn.Module()))
_OF_RECIPES = {"_source", "_origin", "_names", "_beside", "_helpers", "_hints"}  # set on a class, and no state


def _is_left_alone(kind: type) -> bool:
    """Whether objects of a class are internal to a library; what is in a threading.local belongs to the process."""
    if issubclass(kind, LRScheduler) or f"{kind.__module__}.".startswith(_LOOKED_INTO_TOO):
        return False
    library = kind.__module__.partition(".")[0]
    return library in _LEFT_ALONE_TOO or (library in sys.stdlib_module_names and library not in _LOOKED_INTO)


def _numpy() -> Any:
    return sys.modules.get("numpy")


def is_plain(value: Any) -> bool:
    numpy = _numpy()
    return isinstance(value, (*_PLAIN, numpy.generic) if numpy else _PLAIN)


def _arrays() -> tuple[type, ...]:
    """NumPy's classes of what changes in place."""
    numpy = _numpy()
    return (numpy.ndarray, numpy.random.Generator, numpy.random.RandomState) if numpy else ()


def objects_in(value: Any, depth: int = 0) -> Iterator[Any]:
    """The objects of which it may matter which one is in a place: those of a name, tensors and arrays at any depth."""
    if isinstance(value, Is):
        if value.first is None and not isinstance(value.value, BY_NAME):
            yield value.value
    elif isinstance(value, (Tensor, *_arrays())):
        yield value
    elif isinstance(value, list | tuple | deque | dict) and len(value) <= MOST_ITEMS and depth < MOST_DEPTH:
        for item in value.values() if isinstance(value, dict) else value:
            yield from objects_in(item, depth + 1)


def _nbytes(value: Any) -> int:
    """Of a tensor or an array; a file's are not counted."""
    numpy = _numpy()
    if numpy and isinstance(value, numpy.memmap):
        return MOST_DATA_BYTES + 1
    return int(value.nbytes) if isinstance(value, (Tensor, numpy.ndarray) if numpy else Tensor) else 0


def _is_examples(value: Any) -> bool:
    """Whether a container is one of examples, such as tensors, and not of names or numbers."""
    if not isinstance(value, _CONTAINERS):
        return False
    if len(value) > MOST_EXAMPLES:
        return len(value) > MOST_ITEMS or plain_bytes(value) is None
    items = list(value.values() if isinstance(value, dict) else value)
    return sum(map(_nbytes, items)) > MOST_DATA_BYTES


def memory_of(tensor: Tensor) -> int | None:
    """Where a tensor's numbers begin, the same for all views of them; None if there are none."""
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return None
    return local(tensor.detach()).untyped_storage().data_ptr() or None


def without_is(path: PlacePath) -> PlacePath:
    return path[:-1] if path[-1] == IS else path


def is_data(value: Any) -> bool:
    """Whether a container holds only values that can be saved, at any depth."""
    if plain_bytes(value) is not None:
        return True
    try:
        encode(value, None)
    except Unsavable:
        return False
    return True


def mark_of(value: Any) -> Any:
    """A fingerprint of a value, which differs once the value has changed, even within the same object."""
    numpy = _numpy()
    if isinstance(value, Is):
        return value.mark
    if isinstance(value, Tensor):
        if value.layout == torch.strided and value.device.type != "meta":
            # by content: what writes to `.data` or through NumPy leaves torch's version counter as it is
            with contextlib.suppress(RuntimeError, NotImplementedError):  # quantised, nested
                return (value.dtype, value.shape, _checksum(value), value.is_leaf and value.requires_grad)
        return (_Same(value), value._version)
    if isinstance(value, Shape):
        return tuple(value)
    if isinstance(value, float):
        return (type(value), float.hex(value))  # tells zeros apart by their sign, and nan equals nan
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if numpy and isinstance(value, numpy.ndarray):
        if isinstance(value, numpy.memmap):
            return _Same(value)  # a file, which may be larger than memory
        if value.dtype.hasobject:
            return (_Same(value), value.size < MOST_ITEMS and tuple(map(mark_of, value.flat)))
        return (value.dtype, value.shape, zlib.crc32(value.tobytes()))
    if hasattr(value, "__next__"):
        return repr(value) if isinstance(value, itertools.count) else object()  # position unknown: counts as changed
    if hasattr(value, "__len__") and len(value) > MOST_ITEMS:
        return (_Same(value), len(value))
    if isinstance(value, list | dict | set | tuple) and (plain := plain_bytes(value)) is not None:
        return (type(value), zlib.crc32(plain), len(plain))
    with contextlib.suppress(TypeError, ValueError, BufferError):  # such as array.array
        return (type(value), zlib.crc32(memoryview(value)))
    tensors: dict[str, Tensor] = {}
    try:
        text = repr(encode(value, tensors))
    except Unsavable:
        return (_Same(value), repr(type(value)))
    return (text, tuple((name, mark_of(tensor)) for name, tensor in tensors.items()))


def _checksum(tensor: Tensor) -> int:
    """A hash of a tensor's bits: of 2 GB a second on a core; on its device if that is a GPU."""
    plain = local(tensor.detach()).contiguous().view(-1).view(torch.uint8)
    if plain.device.type == "cpu" or len(plain) % 4 or len(plain) < 1 << 16:
        return zlib.crc32(plain.cpu().numpy().data) if len(plain) else 0
    return int(fingerprint((plain.clone() if plain.storage_offset() % 4 else plain).view(torch.int32)))


def nowhere(value: Any) -> None:
    """The setter of a place whose object stays: its contents were restored."""


def set_attribute(owner: Any, name: str, value: Any) -> None:
    if dataclasses.is_dataclass(owner) and getattr(type(owner), "__dataclass_params__", None) is not None:
        object.__setattr__(owner, name, value)  # works on frozen ones too
    else:
        setattr(owner, name, value)


def _set_requires_grad(parameter: nn.Parameter, value: bool) -> None:
    parameter.requires_grad_(value)


def _set_cell(cell: Any, value: Any) -> None:
    cell.cell_contents = value


def set_item(owner: Any, key: Any, value: Any) -> None:
    if not isinstance(owner, tuple | frozenset):
        owner[key] = value


def _set_in_tuple(value: tuple[Any, ...], parts: list[Any], put: Callable[[Any], None], key: int, item: Any) -> None:
    """Puts another tuple in the place of one: with this item, and those that were set before."""
    parts[key] = item
    put(type(value)._make(parts) if hasattr(value, "_make") else type(value)(parts))


def set_new(owner: Any, name: str, value: Any) -> None:
    """Sets a value where there was none at the start: an attribute, or an item of a dict."""
    if name.startswith("["):
        if isinstance(owner, list | deque) and _key(name) == len(owner):
            owner.append(value)
            return
        if not isinstance(owner, dict):
            raise LookupError
        owner[_key(name)] = value
    elif name.startswith("<"):
        raise LookupError
    else:
        set_attribute(owner, name, value)


def is_new_name(name: str) -> bool:
    """Whether `set_new` can set a value by that name."""
    if name.startswith("["):
        try:
            _key(name)
        except (ValueError, SyntaxError):
            return False
    return not name.startswith("<")


def set_shape(owner: Any, said: dict[str, Any]) -> None:
    """Removes items that a container no longer had, and puts those of a dict in the order in which they were."""
    if isinstance(owner, nn.Module):
        owner = owner._modules
    if isinstance(owner, list | deque):
        for _ in range(len(owner) - said["length"]):
            owner.pop()
        return
    if not isinstance(owner, dict):
        raise LookupError
    keys = decode(said["keys"], {}, None)
    for key in [key for key in owner if isinstance(key, int | str) and key not in keys]:
        del owner[key]
    for key in (key for key in keys if key in owner):
        owner[key] = owner.pop(key)


def _key(name: str) -> Any:
    import ast

    return ast.literal_eval(name[1:-1])
