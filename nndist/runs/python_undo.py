"""Python objects put back as they were: what a pass that must leave no trace has changed in them.

`python_state` tells what has changed since the start of a run; this undoes what has changed since a moment ago, in the
same objects, and removes what was not there.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .python_marks import Is, Shape, is_data, is_plain, mark_of
from .python_places import Place
from .python_setters import set_attribute, set_item
from .python_state import PythonState, readable
from .python_values import Unsavable, decode, encode


@contextlib.contextmanager
def unnoticed(state: PythonState) -> Iterator[None]:
    """Context manager: the recipe's objects have the values of before afterwards, but for those that only advance."""
    before = None
    with contextlib.suppress(CanNotBeUndone):
        before = Remembered(state, networks=False)
    yield
    if before is not None:
        with contextlib.suppress(CanNotBeUndone):
            before.put_back()


def unnoticed_reading(recipe: Any, functions: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
    """The same for what reads examples: only their sets and the recipe's modules, not models that the recipe holds."""
    names = {"__module__": type(recipe).__module__, "file": getattr(recipe, "file", None), "helpers": dict}
    return unnoticed(PythonState(type("Nothing", (), names)(), {}, functions=functions))


MOST_ROUNDS = 8
"""An object that comes back may hold others that were replaced."""


class CanNotBeUndone(Exception):
    """Names a value that a second pass would change for good."""


class Remembered:
    """The values of all objects of a recipe and its networks now, for `put_back`.

    networks: whether those of the networks' modules, too. Raises CanNotBeUndone for a value that only advances, such as
    an iterator.
    """

    def __init__(self, state: PythonState, *, networks: bool = True):
        self.state, self.networks = state, networks
        self.kept = {place.path: _Kept(place) for place in self._places()}

    def put_back(self) -> None:
        """Gives every object the values that it had; raises CanNotBeUndone if it can't be restored."""
        for _ in range(MOST_ROUNDS):
            places = self._places()
            known = [(self.kept[place.path], place) for place in places if place.path in self.kept]
            replaced = [(kept, place) for kept, place in known if kept.is_replaced(place)]
            for kept, place in replaced:
                place.set(kept.value)
            # an object is visited once: while others are being replaced, it may appear in another of its places
            new = [] if replaced else [place for place in places if place.path not in self.kept]
            if not replaced and not any([_remove(place) for place in new]):
                break
        for kept, place in known:
            if not kept.put_back(place):
                raise CanNotBeUndone(readable(place.path))

    def _places(self) -> list[Place]:
        places = [place for place in self.state._places(objects=True) if not isinstance(place.value, Is)]
        return [place for place in places if self.networks or not place.path[0].startswith("networks[")]


class _Kept:
    """A place's value as it was. kind: how it is kept."""

    def __init__(self, place: Place):
        value = self.value = place.value
        self.gradient: tuple[Tensor, Tensor] | None = None
        self.copy: Any = None
        if isinstance(value, nn.Parameter) or (isinstance(value, Tensor) and value.is_leaf and value.requires_grad):
            self.gradient = (value.grad, value.grad.clone()) if value.grad is not None else None
        if isinstance(value, Tensor):
            self.kind = "tensor"
            self.copy = value.detach().clone() if value.layout == torch.strided and not value.is_meta else None
        elif isinstance(value, Shape):
            self.kind = "object"
        elif is_plain(value):
            self.kind = "array" if hasattr(value, "tobytes") and hasattr(value, "copy") else "plain"
            self.copy = value.copy() if self.kind == "array" else None
            if hasattr(value, "bit_generator") or hasattr(value, "get_state"):  # NumPy's generators
                self._encode(value)
        elif isinstance(value, dict | list | set | deque) and not is_data(value):
            self.kind, self.copy = "container", list(value.items() if isinstance(value, dict) else value)
        elif isinstance(value, itertools.count):
            self.kind, self.copy = "count", repr(value)
        elif hasattr(value, "__next__") and not isinstance(value, type):
            raise CanNotBeUndone(readable(place.path))
        else:
            self.kind = "object"
            with contextlib.suppress(Unsavable):
                self._encode(value)

    def _encode(self, value: Any) -> None:
        tensors: dict[str, Tensor] = {}
        encoded = encode(value, tensors)
        self.kind, self.mark = "encoded", mark_of(value)
        self.copy = encoded, {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def is_replaced(self, place: Place) -> bool:
        """Whether the place holds another object, or another plain value, than it did."""
        if isinstance(self.value, Shape) or not _can_be_set(place):
            return False
        if self.kind == "plain":
            return type(place.value) is not type(self.value) or mark_of(place.value) != mark_of(self.value)
        return place.value is not self.value

    def put_back(self, place: Place) -> bool:
        """Gives the object that is in the place the contents that it had; returns whether that is possible."""
        value = place.value
        if self.kind == "tensor" and self.copy is not None and isinstance(value, Tensor):
            if value.shape != self.copy.shape or not same(value, self.copy):
                with torch.no_grad():
                    value.copy_(self.copy)
            if value.is_leaf and value.requires_grad:
                value.grad = self.gradient[0] if self.gradient is not None else None
                if self.gradient is not None and not same(*self.gradient):
                    self.gradient[0].copy_(self.gradient[1])
        elif self.kind == "encoded" and mark_of(value) != self.mark:
            encoded, tensors = self.copy
            decode(encoded, tensors, like=value)
        elif self.kind == "array" and value.shape == self.copy.shape:
            if value.ndim and not (value == self.copy).all():
                value[...] = self.copy
        elif self.kind == "container":
            refill(value, self.copy)
        elif self.kind == "count":
            return repr(value) == self.copy
        return True


def refill(value: Any, items: list[Any]) -> None:
    """Gives a container these items again, if it holds others."""
    now = list(value.items() if isinstance(value, dict) else value)
    parts = [one for pair in now for one in pair] if isinstance(value, dict) else now
    wanted = [one for pair in items for one in pair] if isinstance(value, dict) else items
    if len(parts) == len(wanted) and all(one is other for one, other in zip(parts, wanted, strict=True)):
        return
    value.clear()
    value.extend(items) if isinstance(value, list | deque) else value.update(items)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape have the same bits."""
    if one.layout != torch.strided or one.is_meta:
        return True
    first, second = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(first, second)


def _can_be_set(place: Place) -> bool:
    return isinstance(place.set, functools.partial)


def _remove(place: Place) -> bool:
    """Removes what was not there, from its object or dict; returns whether it could."""
    if not isinstance(place.set, functools.partial) or place.set.func not in (set_attribute, set_item):
        return False
    owner, key = place.set.args
    try:
        if place.set.func is set_attribute:
            delattr(owner, key)
        elif isinstance(owner, dict):
            del owner[key]
        else:
            return False
    except (AttributeError, KeyError, TypeError):
        return False
    return True
