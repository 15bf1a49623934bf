"""What a recipe's `data` sets on it, stored in the run's folder, so that its networks can be built without the data."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runs.python_values import Fields, Unsavable, decode, encode
from .scaling import Scaling

FILE = "found.safetensors"
MAX_JSON_BYTES = 4 << 20  # of one value: run.json is rewritten at each evaluation
ANEW: Fields = {Scaling: ("mean", "std")}
REMEDY = "let data() set numbers, strings, lists, dicts or tensors of at most a million numbers"
ROUNDING = 1e-5  # of sums in another order, as on another number of threads
_ENCODED = "$encoded"
_KINDS = ("tensor", "array", "tuple", "set", "frozenset", "dict", "path", "scaling", "float")


class Kept(tuple[dict[str, Any], dict[str, Tensor]]):
    """Values as JSON, and their tensors. left_out: the class of each value that can't be stored, by its name."""

    left_out: Mapping[str, str] = {}


def kept(values: Mapping[str, Any]) -> Kept:
    """Those of the values that can be stored, as JSON, and the tensors that it refers to by name.

    These are numbers, strings, None, lists, tuples, sets, dicts, paths, Scalings, and tensors and NumPy arrays of at
    most a million elements, nested at will. Others are left out.
    """
    found: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    for name, value in values.items():
        own: dict[str, Tensor] = {}
        try:
            encoded = encode(value, own, anew=ANEW)
        except Unsavable:
            left_out[name] = type(value).__name__
            continue
        if len(json.dumps(encoded)) <= MAX_JSON_BYTES:
            found[name] = {_ENCODED: encoded} if isinstance(encoded, dict) else encoded
            tensors |= {f"{name}/{key}": tensor for key, tensor in own.items()}
        else:
            left_out[name] = type(value).__name__
    result = Kept((found, tensors))
    result.left_out = left_out
    return result


def missed(left_out: Mapping[str, str], kind: type) -> str:
    """A note on values left out that `networks` or `predict` of a recipe's class mention, which a loaded run lacks."""
    used = _mentioned(kind, ("networks", "predict")) - _mentioned(kind, ("__post_init__",))
    for name in sorted(left_out.keys() & used):
        if isinstance(inspect.getattr_static(kind, name, None), functools.cached_property):
            continue
        return (
            f"data() sets self.{name} to an object of {left_out[name]}, which a run can't keep: networks() and "
            f"predict() lack it where the run is used; {REMEDY}"
        )
    return ""


def _mentioned(kind: type, methods: tuple[str, ...]) -> set[str]:
    """The names that methods of a class mention, and the methods that these mention, but for `data`."""
    names: set[str] = set()
    waiting, seen = list(methods), {"data"}
    while waiting:
        method = waiting.pop()
        function = inspect.getattr_static(kind, method, None)
        if method in seen or not isinstance(function, types.FunctionType):
            continue
        seen.add(method)
        codes = [function.__code__]
        while codes:
            code = codes.pop()
            names.update(code.co_names)
            waiting += code.co_names
            codes += [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return names


def alike(one: Any, other: Any) -> bool:
    """Whether two values are the same but for rounding; True for what can't be stored."""
    mine, theirs = kept({"value": one}), kept({"value": other})
    if not mine[0] or not theirs[0]:
        return True
    return (
        _alike(mine[0], theirs[0])
        and mine[1].keys() == theirs[1].keys()
        and all(_alike_tensors(tensor, theirs[1][name]) for name, tensor in mine[1].items())
    )


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=ROUNDING, abs_tol=ROUNDING)
    return bool(one == other)


def _alike_tensors(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.allclose(one.double(), other.double(), rtol=ROUNDING, atol=ROUNDING, equal_nan=True)


def digest(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of what `kept` returned."""
    found = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.numel():
            found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def restored(found: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Inverse of `kept`; raises KeyError if a tensor is missing."""
    values = {}
    for name, value in found.items():
        if isinstance(value, dict) and value.keys() == {_ENCODED}:
            place = f"{name}/"
            own = {key.removeprefix(place): tensor for key, tensor in tensors.items() if key.startswith(place)}
            values[name] = decode(value[_ENCODED], own, None, ANEW)
        else:
            values[name] = _unpacked(value, tensors)
    return values


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """A value in the format of runs before 2026-11-30."""
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    kind: str = next(iter(value), "")
    inside: Any = value.get(kind)
    if len(value) != 1 or not kind.startswith("$") or kind[1:] not in _KINDS:
        return {key: _unpacked(item, tensors) for key, item in value.items()}
    if kind == "$tensor":
        return tensors[inside].clone()
    if kind == "$array":
        return tensors[inside].numpy().copy()
    if kind == "$float":
        return float(inside)
    if kind == "$path":
        return Path(inside)
    if kind == "$dict":
        return {_unpacked(key, tensors): _unpacked(item, tensors) for key, item in inside}
    items = [_unpacked(item, tensors) for item in inside]
    if kind == "$scaling":
        return Scaling(*items)
    return {"$tuple": tuple, "$set": set, "$frozenset": frozenset}[kind](items)
