"""What a recipe's `data` has found out, kept in the run's folder, so that its networks can be made without the data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .scaling import Scaling

FILE = "found.safetensors"
MAX_NUMBERS = 1_000_000  # of a tensor that is kept: a vocabulary's vectors, not the data
MAX_JSON_BYTES = 4 << 20  # of one value: run.json is written anew at each evaluation
MAX_ITEMS = 1_000_000  # of a list or dict
_KINDS = ("tensor", "array", "tuple", "set", "frozenset", "dict", "path", "scaling", "float")


class NotKept(Exception):
    """A value that can't be kept: too large, or of a kind that no plain file holds."""


def kept(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What can be kept of the values, as JSON and as tensors, to which the JSON refers by their names.

    That is numbers, texts, None, lists, tuples, sets, dicts, paths, Scalings, and tensors and arrays of NumPy of at
    most a million numbers, nested as one likes. Whatever else there is is left out.
    """
    found: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, value in values.items():
        own: dict[str, Tensor] = {}
        try:
            packed = _packed(value, name, own)
        except NotKept:
            continue
        if len(json.dumps(packed)) > MAX_JSON_BYTES:
            continue
        found[name] = packed
        tensors |= own
    return found, tensors


def restored(found: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `kept` was given, of what it gave; raises KeyError where a tensor is not there."""
    return {name: _unpacked(value, tensors) for name, value in found.items()}


def _packed(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if type(value) is float and not math.isfinite(value):
        return {"$float": str(value)}  # JSON has no such number
    if type(value) in (bool, int, float, str) or value is None:
        return value
    if isinstance(value, Enum):
        raise NotKept(place)  # its class is code, which a file of numbers does not hold
    if isinstance(value, Scaling):
        return {
            "$scaling": [_packed(value.mean, f"{place}.mean", tensors), _packed(value.std, f"{place}.std", tensors)]
        }
    if isinstance(value, Tensor):
        if value.numel() > MAX_NUMBERS or value.layout != torch.strided or value.is_complex():
            raise NotKept(place)
        tensors[place] = value.detach().cpu().contiguous().clone()
        return {"$tensor": place}
    if isinstance(value, Path):
        return {"$path": str(value)}
    if isinstance(value, list | tuple | set | frozenset | dict) and len(value) > MAX_ITEMS:
        raise NotKept(place)
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value) and not any(key.startswith("$") for key in value):
            return {key: _packed(item, f"{place}.{key}", tensors) for key, item in value.items()}
        pairs = enumerate(value.items())
        return {
            "$dict": [
                [_packed(k, f"{place}.{n}", tensors), _packed(v, f"{place}.{n}.value", tensors)] for n, (k, v) in pairs
            ]
        }
    if type(value) in (list, tuple):
        items = [_packed(item, f"{place}.{number}", tensors) for number, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, set | frozenset):
        kind = "$frozenset" if isinstance(value, frozenset) else "$set"
        return {kind: [_packed(item, place, tensors) for item in sorted(value, key=repr)]}
    if type(value).__module__ == "numpy":
        return _packed_of_numpy(value, place, tensors)
    raise NotKept(place)


def _packed_of_numpy(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    try:
        if getattr(value, "ndim", None) == 0:
            return _packed(value.item(), place, tensors)
        _packed(torch.from_numpy(value.copy()), place, tensors)
    except (TypeError, ValueError, AttributeError):
        raise NotKept(place) from None
    return {"$array": place}


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
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
