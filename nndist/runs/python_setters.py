"""Setting the value of a place that `python_places.Walk` has found: as another process or a moment ago had it."""

from __future__ import annotations

import ast
import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Any

from torch import nn

from .python_values import decode


def nowhere(value: Any) -> None:
    """The setter of a place whose object stays: its contents were restored."""


def set_attribute(owner: Any, name: str, value: Any) -> None:
    if dataclasses.is_dataclass(owner) and getattr(type(owner), "__dataclass_params__", None) is not None:
        object.__setattr__(owner, name, value)  # works on frozen ones too
    else:
        setattr(owner, name, value)


def set_requires_grad(parameter: nn.Parameter, value: bool) -> None:
    parameter.requires_grad_(value)


def set_cell(cell: Any, value: Any) -> None:
    cell.cell_contents = value


def set_item(owner: Any, key: Any, value: Any) -> None:
    if not isinstance(owner, tuple | frozenset):
        owner[key] = value


def set_in_tuple(value: tuple[Any, ...], parts: list[Any], put: Callable[[Any], None], key: int, item: Any) -> None:
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

    return ast.literal_eval(name[1:-1])
