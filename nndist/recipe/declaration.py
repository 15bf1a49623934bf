"""Checks of a recipe's class: mistakes that Python silently accepts are fixed, or refused in one line."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from functools import cache
from typing import Any, ClassVar

from ..errors import UserError
from .fields import hints_of


@cache
def reserved_names(base: type) -> frozenset[str]:
    """The names of a recipe's methods and properties, which no field or attribute may have."""
    return frozenset(
        name for name, value in vars(base).items() if not name.startswith("_") and _is_of_a_class(value)
    ) - frozenset(getattr(base, "__annotations__", {}))


def _is_of_a_class(value: Any) -> bool:
    """Whether a value in a class body is a method, a property or the like."""
    return callable(value) or hasattr(value, "__get__")


def check_class(kind: type, base: type) -> None:
    """Raises UserError for a class with an invalid body, before any decorator runs."""
    body, annotated = vars(kind), dict(vars(kind).get("__annotations__", {}))
    for name in [*annotated, *body]:
        if name in reserved_names(base) and (name in annotated or not _is_of_a_class(body[name])):
            raise UserError(reserved(kind, name))
    for name, value in body.items():
        if inspect.isfunction(value) and inspect.isfunction(vars(base).get(name)) and not name.startswith("_"):
            _check_parameters(kind, name, value, vars(base)[name])
    for name, hint in annotated.items():
        default = body.get(name)
        if isinstance(default, list | dict | set) and not _is_class_variable(hint):
            shown = ", ".join(map(repr, default)) if isinstance(default, list | set) else ""
            example = f"{name}: tuple = ({shown}{',' * (len(default) == 1)})" if shown else "a tuple"
            raise UserError(
                f"{kind.__name__}.{name}: a {type(default).__name__} can't be the default of a field, since all "
                f"recipes would share it; give a tuple, such as {example}"
            )


def _check_parameters(kind: type, name: str, method: Any, contract: Any) -> None:
    """Raises UserError for a method that can't be called as the contract's is: with its parameters, by position."""
    wanted = list(inspect.signature(contract).parameters)
    try:
        inspect.signature(method).bind(*wanted)
    except TypeError:
        raise UserError(
            f"{kind.__name__}.{name}: takes other parameters than the loop gives; write def {name}({', '.join(wanted)})"
        ) from None
    except ValueError:  # a function without a signature
        return


def reserved(kind: type, name: str) -> str:
    """The error line for a reserved name."""
    return (
        f"{kind.__name__}.{name}: {name!r} is taken, every recipe has a method or property of that name; "
        f"rename the field or attribute, such as {name}_ or my_{name}"
    )


def completed(kind: type, base: type) -> None:
    """Make each undecorated recipe class a dataclass, bases first; otherwise its fields would be ignored.

    In such a class `lr = 0.1`, without a type, changes the default of an inherited field; in a decorated one, where
    @dataclass ignores it, it is refused. Raises UserError.
    """
    for one in reversed(kind.__mro__):
        if one is base or not issubclass(one, base):
            continue
        decorated = "__dataclass_fields__" in vars(one)
        above = [kind for kind in one.__mro__[1:] if dataclasses.is_dataclass(kind)]
        inherited = {field.name: field for kind in reversed(above) for field in dataclasses.fields(kind)}
        annotated = vars(one).get("__annotations__", {})
        untyped = [name for name in inherited if name in vars(one) and name not in annotated]
        if decorated:
            for name in untyped:
                if inherited[name].default is not vars(one)[name]:
                    value = vars(one)[name]
                    raise UserError(
                        f"{one.__name__}.{name} = {value!r}: without a type a dataclass ignores it; write "
                        f"{name}: {_type_text(hints_of(one).get(name))} = {value!r}"
                    )
            continue
        if "__init__" in vars(one):
            raise UserError(
                f"{one.__name__}: a recipe is a dataclass, so its settings are fields and not arguments of __init__; "
                "write them as fields, such as width: int = 32, and remove __init__"
            )
        hints = hints_of(one)
        one.__annotations__ = {**annotated, **{name: hints[name] for name in untyped}}
        check_class(one, base)  # a value that has become a field may be an invalid one
        dataclasses.dataclass(kw_only=True)(one)


def _is_class_variable(hint: Any) -> bool:
    return hint is ClassVar or typing.get_origin(hint) is ClassVar or "ClassVar" in str(hint)


def _type_text(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
