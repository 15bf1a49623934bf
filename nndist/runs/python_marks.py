"""Marks of Python values, by which one process tells what has changed since it looked last.

A mark is a small value that is equal for as long as what it marks is: a checksum of a tensor's numbers, which object a
name stands for (`Is`), how many items a container has (`Shape`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import itertools
import sys
import types
import zlib
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed.blocks import local
from .fingerprints import fingerprint
from .python_values import MOST_DEPTH, MOST_ITEMS, Unsavable, encode, plain_bytes

PlacePath = tuple[str, ...]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.device, Path)
CONTAINERS = (dict, list, tuple, set, frozenset, deque)
BUILT_IN = (types.BuiltinFunctionType, types.BuiltinMethodType)
BY_NAME = (type, types.FunctionType, *BUILT_IN, types.ModuleType, types.MethodType, partial)
"""What is never one of several objects of a class, of which it matters which one it is."""


class Same:
    """Equal only to itself; it keeps its object alive, since an id alone could be reused."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

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
        if isinstance(value, (type, types.ModuleType, *BUILT_IN)):
            return Same(value)
        return type(value)


def numpy_() -> Any:
    return sys.modules.get("numpy")


def is_plain(value: Any) -> bool:
    numpy = numpy_()
    return isinstance(value, (*_PLAIN, numpy.generic) if numpy else _PLAIN)


def arrays() -> tuple[type, ...]:
    """NumPy's classes of what changes in place."""
    numpy = numpy_()
    return (numpy.ndarray, numpy.random.Generator, numpy.random.RandomState) if numpy else ()


def mark_of(value: Any) -> Any:
    """A fingerprint of a value, which differs once the value has changed, even within the same object."""
    numpy = numpy_()
    if isinstance(value, Is):
        return value.mark
    if isinstance(value, Tensor):
        if value.layout == torch.strided and value.device.type != "meta":
            # by content: what writes to `.data` or through NumPy leaves torch's version counter as it is
            with contextlib.suppress(RuntimeError, NotImplementedError):  # quantised, nested
                return (value.dtype, value.shape, _checksum(value), value.is_leaf and value.requires_grad)
        return (Same(value), value._version)
    if isinstance(value, Shape):
        return tuple(value)
    if isinstance(value, float):
        return (type(value), float.hex(value))  # tells zeros apart by their sign, and nan equals nan
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if numpy and isinstance(value, numpy.ndarray):
        if isinstance(value, numpy.memmap):
            return Same(value)  # a file, which may be larger than memory
        if value.dtype.hasobject:
            return (Same(value), value.size < MOST_ITEMS and tuple(map(mark_of, value.flat)))
        return (value.dtype, value.shape, zlib.crc32(value.tobytes()))
    if hasattr(value, "__next__"):
        return repr(value) if isinstance(value, itertools.count) else object()  # position unknown: counts as changed
    if hasattr(value, "__len__") and len(value) > MOST_ITEMS:
        return (Same(value), len(value))
    if isinstance(value, list | dict | set | tuple) and (plain := plain_bytes(value)) is not None:
        return (type(value), zlib.crc32(plain), len(plain))
    with contextlib.suppress(TypeError, ValueError, BufferError):  # such as array.array
        return (type(value), zlib.crc32(memoryview(value)))
    tensors: dict[str, Tensor] = {}
    try:
        text = repr(encode(value, tensors))
    except Unsavable:
        return (Same(value), repr(type(value)))
    return (text, tuple((name, mark_of(tensor)) for name, tensor in tensors.items()))


def _checksum(tensor: Tensor) -> int:
    """A hash of a tensor's bits: of 2 GB a second on a core; on its device if that is a GPU."""
    plain = local(tensor.detach()).contiguous().view(-1).view(torch.uint8)
    if plain.device.type == "cpu" or len(plain) % 4 or len(plain) < 1 << 16:
        return zlib.crc32(plain.cpu().numpy().data) if len(plain) else 0
    return int(fingerprint((plain.clone() if plain.storage_offset() % 4 else plain).view(torch.int32)))


def is_data(value: Any) -> bool:
    """Whether a container holds only values that can be saved, at any depth."""
    if plain_bytes(value) is not None:
        return True
    try:
        encode(value, None)
    except Unsavable:
        return False
    return True


def objects_in(value: Any, depth: int = 0) -> Iterator[Any]:
    """The objects of which it may matter which one is in a place: those of a name, tensors and arrays at any depth."""
    if isinstance(value, Is):
        if value.first is None and not isinstance(value.value, BY_NAME):
            yield value.value
    elif isinstance(value, (Tensor, *arrays())):
        yield value
    elif isinstance(value, list | tuple | deque | dict) and len(value) <= MOST_ITEMS and depth < MOST_DEPTH:
        for item in value.values() if isinstance(value, dict) else value:
            yield from objects_in(item, depth + 1)


def memory_of(tensor: Tensor) -> int | None:
    """Where a tensor's numbers begin, the same for all views of them; None if there are none."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        return None
    if type(tensor) is Tensor:
        return tensor.untyped_storage().data_ptr() or None
    return local(tensor.detach()).untyped_storage().data_ptr() or None
