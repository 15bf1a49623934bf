"""What a recipe's `data` sets on it, stored in the run's folder, so that its networks can be built without the data."""

from __future__ import annotations

import hashlib
import json
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
_ENCODED = "$encoded"
_KINDS = ("tensor", "array", "tuple", "set", "frozenset", "dict", "path", "scaling", "float")


def kept(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Those of the values that can be stored, as JSON, and the tensors that it refers to by name.

    These are numbers, strings, None, lists, tuples, sets, dicts, paths, Scalings, and tensors and NumPy arrays of at
    most a million elements, nested at will. Others are left out.
    """
    found: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, value in values.items():
        own: dict[str, Tensor] = {}
        try:
            encoded = encode(value, own, anew=ANEW)
        except Unsavable:
            continue
        if len(json.dumps(encoded)) <= MAX_JSON_BYTES:
            found[name] = {_ENCODED: encoded} if isinstance(encoded, dict) else encoded
            tensors |= {f"{name}/{key}": tensor for key, tensor in own.items()}
    return found, tensors


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
