"""The fields of a recipe: their types and bounds; as JSON and as command-line text, and back."""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval, Le, Lt

from ..directions import direction_of
from ..errors import UserError

Count = Annotated[int, Ge(1)]
"""An int of at least 1. `Annotated[int, Interval(ge=1, le=180)]`, of annotated_types, has bounds of its own."""
Amount = Annotated[float, Ge(0)]
"""A float of at least 0."""
Fraction = Annotated[float, Interval(ge=0, lt=1)]
"""At least 0 and less than 1: a dropout, a momentum."""
Share = Annotated[float, Interval(gt=0, lt=1)]
"""Between 0 and 1, neither of them."""


def hints_of(kind: type) -> dict[str, Any]:
    """The evaluated type of each annotated name of a class and its bases.

    If a recipe's module was loaded more than once, the types come from the load that defined the class: an Enum of a
    different load has different members. Bounds are left out: Annotated[int, Ge(1)] is int.
    """
    return dict(_hints(kind)[0])


def _hints(kind: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """`hints_of`, and those that have bounds, with them. A training asks a dozen times, so the class keeps them.

    A cache beside it would keep the class, and with it all that its module holds, after another load of the recipe.
    """
    if "_hints" in vars(kind):
        return vars(kind)["_hints"]
    hints: dict[str, Any] = {}
    bounded: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        for name, hint in _annotations(base).items():
            has_bounds = _has_bounds(hint)
            hints[name] = _without_bounds(hint) if has_bounds else hint
            if has_bounds:
                bounded[name] = hint
    kind._hints = hints, bounded  # type: ignore[attr-defined]
    return hints, bounded


def _annotations(kind: type) -> dict[str, Any]:
    """The evaluated annotations of the class itself."""
    module = sys.modules.get(kind.__module__)
    names = vars(kind).get("_names") or (vars(module) if module else {})
    return inspect.get_annotations(kind, globals=dict(names), locals=dict(vars(kind)), eval_str=True)


def _without_bounds(hint: Any) -> Any:
    if typing.get_origin(hint) is Annotated:
        return _without_bounds(typing.get_args(hint)[0])
    if not _has_bounds(hint):
        return hint
    inner = tuple(_without_bounds(part) for part in typing.get_args(hint))
    return typing.Union[inner] if len(options_of(hint)) > 1 else typing.get_origin(hint)[inner]  # noqa: UP007 (of a tuple)


def _has_bounds(hint: Any) -> bool:
    if typing.get_origin(hint) is Annotated:
        return True
    parts = () if typing.get_origin(hint) is Literal else typing.get_args(hint)
    return any(_has_bounds(part) for part in parts)


def check_fields(settings: Any) -> None:
    """Raises UserError for the first field of a dataclass that is none of its choices, not finite or out of bounds.

    The bounds of a base class hold in a subclass that gives the field another default and a plain type.
    """
    kind: type = type(settings)
    hints, bounded = _hints(kind)
    for name, hint in hints.items():
        value, options = getattr(settings, name, None), options_of(hint)
        if name == "best":
            check_best(value)
        shown, choices = f"--{name.replace('_', '-')}", _choices(options)
        if choices and value not in choices and not (value is None and type(None) in options):
            raise UserError(f"{shown} {value!r}: must be one of {', '.join(map(str, choices))}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{shown} {value}: must be a finite number")
        if name in bounded:
            _check_value(shown, value, bounded[name])


def check_best(best: Any) -> None:
    """Raises UserError for a `best` that is no name: tutorials keep the best value so far under that name."""
    if not isinstance(best, str | None):
        raise UserError(
            f"best = {best!r}: names a score, such as 'val/accuracy', or is None; keep a value of your own under "
            "another name, such as best_"
        )


def _check_value(shown: str, value: Any, hint: Any) -> None:
    """Raises UserError for a number, alone or in a tuple or list, that is outside the bounds of its type."""
    for option in options_of(hint):
        if typing.get_origin(option) is Annotated:
            if isinstance(value, int | float) and not isinstance(value, bool):
                check_bounds(shown, value, [bound for bound in option.__metadata__ if isinstance(bound, _BOUNDS)])
        elif isinstance(value, tuple | list) and (parts := typing.get_args(option)):
            each = parts if len(parts) == len(value) and parts[-1] is not ... else parts[:1] * len(value)
            for item, part in zip(value, each, strict=True):
                _check_value(shown, item, part)


def check_bounds(shown: str, value: float, bounds: Sequence[Any]) -> None:
    """Raises UserError unless a number lies within bounds of annotated_types; shown: the flag."""
    ge, gt, le, lt = (
        next((limit for bound in bounds if (limit := getattr(bound, key, None)) is not None), None)
        for key in ("ge", "gt", "le", "lt")
    )
    if (
        (ge is None or value >= ge)
        and (gt is None or value > gt)
        and (le is None or value <= le)
        and (lt is None or value < lt)
    ):
        return
    if (ge is not None and le is not None) or (gt is not None and lt is not None):
        low, high = (ge, le) if ge is not None else (gt, lt)
        raise UserError(f"{shown} {value}: must lie between {low} and {high}")
    words = {"at least": ge, "above": gt, "at most": le, "less than": lt}
    said = " and ".join(f"{word} {limit}" for word, limit in words.items() if limit is not None)
    raise UserError(f"{shown} {value}: must be {said}")


_BOUNDS = (Ge, Gt, Le, Lt, Interval)


def _choices(options: tuple[Any, ...]) -> list[Any]:
    """The choices of a type that allows nothing else; [] for other types."""
    if any(typing.get_origin(option) is not Literal and option is not type(None) for option in options):
        return []
    return [choice for option in options for choice in typing.get_args(option)]


def options_of(hint: Any) -> tuple[Any, ...]:
    """The members of a union type, or the type itself."""
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def to_json(value: Any) -> Any:
    """A field's value in JSON's types: an Enum by its name, a Path as text, a tuple as a list."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(to_json(key)): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((to_json(item) for item in value), key=str)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def from_json(value: Any, hint: Any) -> Any:
    """Inverse of `to_json`, given the field's type; a value that does not fit the type is returned unchanged."""
    options = options_of(hint)
    if value is None and (type(None) in options or hint is None):
        return None
    for option in options:
        found = _read(value, option)
        if found is not _NO_SUCH:
            return found
    return value


_NO_SUCH = object()


def _read(value: Any, kind: Any) -> Any:
    """The value as one type; _NO_SUCH if it does not fit."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _read(value, arguments[0])
    if origin is Literal:
        return next((choice for choice in arguments if to_json(choice) == value), _NO_SUCH)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _member(value, kind)
    if kind is Path and isinstance(value, str):
        return Path(value)
    plain = origin or kind
    if plain in (tuple, list, set, frozenset) and isinstance(value, list):
        places = arguments or (Any, ...)
        if plain is tuple and places[-1] is not ... and len(places) != len(value):
            return _NO_SUCH
        each = places if plain is tuple and places[-1] is not ... else (places[0],) * len(value)
        return plain(from_json(item, one) for item, one in zip(value, each, strict=True))
    if plain is dict and isinstance(value, dict):
        keys, items = arguments or (Any, Any)
        return {_key(key, keys): from_json(item, items) for key, item in value.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = hints_of(kind)
        return kind(**{name: from_json(item, hints.get(name)) for name, item in value.items() if name in hints})
    if kind is float and type(value) in (int, float):
        return value  # an int stays an int, as in the trained run
    return value if isinstance(kind, type) and type(value) is kind else _NO_SUCH


def _key(key: str, kind: Any) -> Any:
    """A key of a dict, from JSON's text."""
    return kind(key) if kind in (int, float) else from_json(key, kind)


def _member(value: Any, kind: type[Enum]) -> Any:
    """An Enum's member by its name; runs of earlier versions store "Colour.RED", or its value."""
    name = str(value).rpartition(".")[2]
    if name in kind.__members__:
        return kind[name]
    return next((member for member in kind if member.value == value), _NO_SUCH)


def from_text(text: str, hint: Any, now: Any) -> Any:
    """A field's value from a flag's text; raises ValueError if it is invalid for the type.

    now: the field's current value, whose type counts if the hint says nothing.
    """
    options = [option for option in options_of(hint) if option is not type(None)]
    if len(options) < len(options_of(hint)) and text.lower() == "none":
        return None
    for option in options:
        if isinstance(option, type) and issubclass(option, Enum):
            if text in option.__members__:
                return option[text]
        elif typing.get_origin(option) is Literal:
            for choice in typing.get_args(option):
                if str(to_json(choice)) == text:
                    return choice
        elif option is bool:
            if text.lower() in ("true", "false", "yes", "no"):
                return text.lower() in ("true", "yes")
        elif option in (int, float, str, Path):
            try:
                return option(text)
            except ValueError:
                continue
        elif (typing.get_origin(option) or option) is tuple:
            places = typing.get_args(option) or (str, ...)
            cells = text.replace(",", " ").split()
            each = (places[0],) * len(cells) if places[-1] is ... else places
            if len(each) == len(cells):
                return tuple(from_text(cell, one, None) for cell, one in zip(cells, each, strict=True))
        elif not isinstance(option, type) or option in (Any, object):
            return type(now)(text) if isinstance(now, int | float) and not isinstance(now, bool) else text
    raise ValueError(text)


def as_now(fields: Mapping[str, Any], recipe: Any) -> dict[str, Any]:
    """A run's fields as the current version writes them: earlier ones wrote Enums differently."""
    hints = hints_of(type(recipe))
    return {name: to_json(from_json(value, hints.get(name))) for name, value in fields.items()}


def comparable(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A run's fields in the form in which two launches of it are compared.

    `best_is` is resolved to its meaning: runs of earlier versions store "highest" if it was not given.
    """
    best, best_is = fields.get("best"), fields.get("best_is")
    resolved = (best_is or direction_of(str(best))) if best else None
    return {**fields, "best_is": resolved} if "best_is" in fields or "best" in fields else dict(fields)
