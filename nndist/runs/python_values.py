"""Python values as JSON and tensors, and back: how run folders store a recipe's objects without pickle."""

from __future__ import annotations

import base64
import enum
import importlib
import itertools
import marshal
import math
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Json = Any
Fields = Mapping[type, tuple[str, ...]]
MOST_ITEMS = 100_000  # of one container
MOST_ITEMS_ANEW = 1_000_000  # of a container or tensor to recreate: enough for a vocabulary and vectors, not the data
MOST_LOOKED_AT = 1000  # items of a container
MOST_DEPTH = 12  # of nested containers; a manifest has its own limit, too


class Unsavable(Exception):
    """A value that only pickle can store."""


class Held(dict[str, Tensor]):
    """Tensors of a value, and which of them, by identity, were there at the start: others must not overwrite those."""

    def __init__(self, is_original: Callable[[Any], bool]):
        super().__init__()
        self.is_original = is_original


def plain_bytes(value: Any) -> bytes | None:
    """A container of nothing but Python's own plain types, at any depth, as bytes; None for another one.

    Twenty times as fast as `encode`, for containers as large as a dataset's annotations.
    """
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    if any(hasattr(type(item), "__array__") for item in itertools.islice(items, MOST_LOOKED_AT)):
        return None  # marshal would copy arrays, and read files that are mapped into memory
    try:
        return marshal.dumps(value, 2)
    except ValueError:
        return None


def encode(
    value: Any, tensors: dict[str, Tensor] | None, depth: int = 0, *, anew: Fields | None = None, alone: bool = False
) -> Json:
    """A value as JSON; its tensors are added to `tensors`, numbered. Raises Unsavable.

    tensors: None to check only whether the value can be saved.
    anew: given if `decode` will recreate the value without a `like`: what needs code, such as the class of an enum, is
    then refused, and tensors come back on the CPU. Objects of the classes in `anew` can be recreated too, from the
    values of the attributes named there.
    alone: given if `decode` will have no `like`, but the recipe's classes: what it could not make again as it was is
    then refused.
    """
    numpy = sys.modules.get("numpy")
    if isinstance(value, enum.Enum):  # first, as it may be a str, too
        if anew is not None or (alone and not _is_found(type(value))):
            raise Unsavable
        return {"enum": value.name, "of": _named(type(value))}
    if value is None or isinstance(value, bool | str):
        return value
    if type(value) is int:
        return value if abs(value) < 1 << 53 else {"int": str(value)}  # larger ones are not exact as a double
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": [repr(value.real), repr(value.imag)]}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, torch.dtype | torch.device):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    if isinstance(value, Tensor):
        return _encode_tensor(value, tensors, anew)
    if numpy and isinstance(value, numpy.ndarray | numpy.generic):
        return _encode_array(value, tensors, anew)
    is_named = isinstance(value, tuple) and hasattr(value, "_fields")
    is_default = alone and type(value) is defaultdict
    if type(value) in _CONTAINERS or is_named or is_default or (anew is not None and isinstance(value, dict)):
        return _encode_container(value, tensors, depth, anew, alone)
    if anew is not None:
        if type(value) not in anew:
            raise Unsavable
        parts = [encode(getattr(value, name), tensors, depth + 1, anew=anew) for name in anew[type(value)]]
        return {type(value).__name__: parts}
    if (named := f"{type(value).__module__}.{type(value).__qualname__}") in _ARGUMENTS:
        return {"made": named, "from": [encode(part, tensors, depth + 1) for part in _ARGUMENTS[named](value)]}
    if isinstance(value, torch.Generator):
        return {"generator": base64.b64encode(value.get_state().numpy().tobytes()).decode()}
    if isinstance(value, Optimizer) and not alone:
        return {"optimizer": encode(value.state_dict(), tensors)}
    if isinstance(value, random.Random):
        version, numbers, cached = value.getstate()
        return {"random": [version, list(numbers), cached]}
    if numpy and isinstance(value, numpy.random.Generator):
        return {"numpy_generator": encode(value.bit_generator.state, {})}
    if numpy and isinstance(value, numpy.random.RandomState):
        return {"numpy_random": encode(value.get_state(legacy=False), {})}
    raise Unsavable


_ARGUMENTS: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "builtins.range": lambda value: (value.start, value.stop, value.step),
    "builtins.slice": lambda value: (value.start, value.stop, value.step),
    "builtins.bytearray": lambda value: (bytes(value),),
    "fractions.Fraction": lambda value: (value.numerator, value.denominator),
    "decimal.Decimal": lambda value: (str(value),),
    "datetime.date": lambda value: (value.year, value.month, value.day),
    "datetime.timedelta": lambda value: (value.days, value.seconds, value.microseconds),
}
"""Python's own classes of values, and the arguments that make an equal one."""


def module_title(module: str) -> str:
    """A module's name, without what a recipe's own has before it."""
    return module.removeprefix("nndist_recipe_")


def _named(kind: type) -> list[str]:
    """How a class is called, for `_classes`."""
    return [module_title(kind.__module__), kind.__qualname__]


def _classes(of: list[str]) -> list[Any]:
    """What is called so in the modules that are loaded."""
    classes = []
    for found in [module for title, module in list(sys.modules.items()) if module_title(title) == of[0]]:
        for part in of[1].split("."):
            found = getattr(found, part, None)  # type: ignore[assignment]
        classes.append(found)
    return classes


def _is_found(kind: type) -> bool:
    return any(found is kind for found in _classes(_named(kind)))


def _enum(name: str, of: list[str] | None, like: Any) -> enum.Enum:
    """A member of the class of `like`, or of one that is loaded. Raises LookupError."""
    classes = [type(like)] if isinstance(like, enum.Enum) else []
    if of is not None:  # not in checkpoints of earlier versions
        classes += _classes(of)
    for kind in classes:
        if isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__:
            return kind[name]
    raise LookupError(name)


def _encode_tensor(value: Tensor, tensors: dict[str, Tensor] | None, anew: Fields | None) -> Json:
    if value.layout != torch.strided or value.device.type == "meta" or value.dtype == torch.complex128:
        raise Unsavable
    if anew is not None:
        if value.numel() > MOST_ITEMS_ANEW or value.is_complex():
            raise Unsavable
        value = value.detach().cpu().contiguous().clone()
    elif isinstance(value, nn.Parameter):
        raise Unsavable  # restored in place only
    if tensors is None:
        return {"tensor": ""}
    name = str(len(tensors))
    tensors[name] = value
    about = {"tensor": name, "device": value.device.type, "requires_grad": value.is_leaf and value.requires_grad}
    return about | _rebound(value, tensors)


def _rebound(value: Any, tensors: Any) -> dict[str, bool]:
    """A mark of what is not the object that was there at the start."""
    return {"rebound": True} if isinstance(tensors, Held) and not tensors.is_original(value) else {}


def _encode_array(value: Any, tensors: dict[str, Tensor] | None, anew: Fields | None) -> Json:
    import numpy

    if value.dtype.hasobject or value.dtype.names:
        raise Unsavable
    if anew is not None:
        if not value.ndim:
            return encode(value.item(), tensors, anew=anew)
        if value.size > MOST_ITEMS_ANEW or value.dtype.name not in _SAFE_ARRAYS:
            raise Unsavable
        return {"array": encode(torch.from_numpy(value.copy()), tensors, anew=anew)["tensor"]}
    if tensors is None:
        return {"array": ""}
    array = numpy.ascontiguousarray(value)
    data = base64.b64encode(array.tobytes()).decode()
    about = {"array": data, "dtype": array.dtype.str, "shape": list(value.shape)}
    return about | (_rebound(value, tensors) if isinstance(value, numpy.ndarray) else {})


_SAFE_ARRAYS = {"float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"}
"""The NumPy dtypes that a safetensors file can hold."""


def _encode_container(
    value: Any, tensors: dict[str, Tensor] | None, depth: int, anew: Fields | None, alone: bool
) -> Json:
    if len(value) > (MOST_ITEMS if anew is None else MOST_ITEMS_ANEW) or depth >= MOST_DEPTH:
        raise Unsavable
    depth += 1
    kind = _CONTAINERS.get(type(value), "dict")  # when recreated, a defaultdict loses its function
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        if anew is not None or (alone and not _is_found(type(value))):
            raise Unsavable
        items = [encode(item, tensors, depth, alone=alone) for item in value]
        return {"tuple": items, "of": type(value).__name__, "in": _named(type(value))}
    if isinstance(value, dict):
        pairs = [[encode(one, tensors, depth, anew=anew, alone=alone) for one in pair] for pair in value.items()]
        if not (alone and isinstance(value, defaultdict)):
            return {kind: pairs}
        if value.default_factory not in _FACTORIES.values():
            raise Unsavable
        return {"default_dict": pairs, "makes": getattr(value.default_factory, "__name__", None)}
    ordered = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
    items = [encode(item, tensors, depth, anew=anew, alone=alone) for item in ordered]
    if alone and isinstance(value, torch.Size):
        return {"size": items}
    return {kind: items, "length": value.maxlen} if isinstance(value, deque) else {kind: items}


_CONTAINERS: dict[type, str] = {
    list: "list",
    tuple: "tuple",
    set: "set",
    frozenset: "frozenset",
    deque: "deque",
    dict: "dict",
    OrderedDict: "ordered_dict",
    Counter: "counter",
    torch.Size: "tuple",
}
_FACTORIES: dict[str | None, type | None] = {
    None: None,
    **{kind.__name__: kind for kind in (bool, int, float, str, list, tuple, dict, set)},
}
"""What makes the values of a defaultdict, by name."""


def decode(value: Json, tensors: Mapping[str, Tensor], like: Any, anew: Fields | None = None) -> Any:
    """Inverse of `encode`; updates `like` in place if it is mutable, since others may refer to it.

    anew: the classes that `encode` was given. Raises KeyError if a tensor is missing.
    """
    if not isinstance(value, dict):
        return value
    (kind, held), *more = value.items()
    extra = dict(more)
    if kind == "enum":
        return _enum(held, extra.get("of"), like)
    if kind == "made":
        module, _, name = held.rpartition(".")
        if held not in _ARGUMENTS:
            raise TypeError(held)
        return getattr(importlib.import_module(module), name)(*(decode(part, tensors, None) for part in extra["from"]))
    if kind in ("int", "float"):
        return {"int": int, "float": float}[kind](held)
    if kind == "complex":
        return complex(*map(float, held))
    if kind == "bytes":
        return base64.b64decode(held)
    if kind == "path":
        return Path(held)
    if kind in ("dtype", "device"):
        return getattr(torch, held) if kind == "dtype" else torch.device(held)
    if kind == "tensor":
        return _tensor(tensors[held], like, extra)
    if kind == "generator":
        generator = like if isinstance(like, torch.Generator) else torch.Generator()
        generator.set_state(torch.frombuffer(bytearray(base64.b64decode(held)), dtype=torch.uint8))
        return generator
    if kind == "random":
        own = like if isinstance(like, random.Random) else random.Random()
        own.setstate((held[0], tuple(held[1]), held[2]))
        return own
    if kind == "optimizer":
        _load_optimizer(like, decode(held, tensors, None))
        return like
    if kind in ("numpy_generator", "numpy_random", "array"):
        return _decode_numpy(kind, held, extra, tensors, like)
    for made in anew or {}:
        if made.__name__ == kind:
            return made(*(decode(part, tensors, None, anew) for part in held))
    return _container(kind, held, extra, tensors, like, anew)


def _load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """load_state_dict, but groups and state stay the objects that they are: another optimizer may share them."""
    groups, state = optimizer.param_groups, optimizer.state
    members = list(groups)
    is_torchs = type(optimizer).load_state_dict is Optimizer.load_state_dict
    is_plain = is_torchs and type(optimizer).state_dict is Optimizer.state_dict and not _has_hooks(optimizer)
    optimizer.load_state_dict({**saved, "state": {}} if is_plain else saved)
    for own, loaded in zip(members, optimizer.param_groups, strict=True):
        own.clear()
        own.update(loaded)
    loaded_state = _own_state(members, saved) if is_plain else dict(optimizer.state)
    state.clear()
    state.update(loaded_state)
    groups[:] = members
    optimizer.param_groups, optimizer.state = groups, state


def _has_hooks(optimizer: Optimizer) -> bool:
    """Whether functions of the recipe's change what is saved or loaded."""
    kinds = ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")
    return any(vars(optimizer).get(f"_optimizer_{kind}_hooks") for kind in kinds)


def _own_state(groups: list[dict[str, Any]], saved: dict[str, Any]) -> dict[Any, Any]:
    """The saved state by parameter, in its own dtypes; load_state_dict would cast it to the parameters'."""
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    owners = [(parameter, group) for group in groups for parameter in group["params"]]
    by_number = dict(zip(numbers, owners, strict=True))

    def placed(key: Any, value: Any, parameter: Tensor, group: dict[str, Any]) -> Any:
        is_counter = key == "step" and not (group.get("capturable") or group.get("fused"))
        return value.to(parameter.device) if isinstance(value, Tensor) and not is_counter else value

    found: dict[Any, Any] = {}
    for number, values in saved["state"].items():
        if number not in by_number:
            found[number] = values
            continue
        parameter, group = by_number[number]
        found[parameter] = {key: placed(key, value, parameter, group) for key, value in values.items()}
    return found


def _tensor(saved: Tensor, like: Any, extra: Mapping[str, Any]) -> Tensor:
    """A saved tensor; in `like`, unless training had another object in its place, or it can't be written to."""
    own = isinstance(like, nn.Parameter) or (isinstance(like, Tensor) and not extra.get("rebound"))
    if own and like.shape == saved.shape and like.dtype == saved.dtype and like.is_leaf and 0 not in like.stride():
        with torch.no_grad():
            like.copy_(saved)
        return like.requires_grad_(extra.get("parameter", extra.get("requires_grad", like.requires_grad)))
    device = like.device if isinstance(like, Tensor) else extra["device"]
    made = saved.to(device).clone()
    if "parameter" in extra:
        return nn.Parameter(made, requires_grad=extra["parameter"])
    return made.requires_grad_(extra["requires_grad"])


def _decode_numpy(kind: str, held: Json, extra: Mapping[str, Any], tensors: Mapping[str, Tensor], like: Any) -> Any:
    import numpy

    if kind == "array" and not extra:
        return tensors[held].numpy().copy()
    if kind == "array":
        array = numpy.frombuffer(base64.b64decode(held), dtype=extra["dtype"]).reshape(extra["shape"])
        own = isinstance(like, numpy.ndarray) and not extra.get("rebound") and like.flags.writeable
        if own and like.shape == array.shape and like.dtype == array.dtype:
            like[...] = array
            return like
        return array.copy() if array.shape or isinstance(like, numpy.ndarray) else array[()]
    state = decode(held, {}, None)
    if kind == "numpy_random":
        generator = like if isinstance(like, numpy.random.RandomState) else numpy.random.RandomState()
        generator.set_state(state)
        return generator
    if not isinstance(like, numpy.random.Generator):
        like = numpy.random.Generator(getattr(numpy.random, state["bit_generator"])())
    like.bit_generator.state = state
    return like


def _container(
    kind: str, held: Json, extra: Mapping[str, Any], tensors: Mapping[str, Tensor], like: Any, anew: Fields | None
) -> Any:
    if kind in ("dict", "ordered_dict", "counter"):
        new = [(decode(key, tensors, None, anew), item) for key, item in held]
        old = like if isinstance(like, dict) else {}
        made = {key: decode(item, tensors, old.get(key), anew) for key, item in new}
        if not (isinstance(like, dict) and (_CONTAINERS.get(type(like), kind) == kind)):
            return {"dict": dict, "ordered_dict": OrderedDict, "counter": Counter}[kind](made)
        like.clear()
        like.update(made)
        return like
    if kind == "default_dict":
        pairs = [(decode(key, tensors, None, anew), decode(item, tensors, None, anew)) for key, item in held]
        return defaultdict(_FACTORIES[extra["makes"]], pairs)
    olds = list(like) if isinstance(like, list | deque | tuple) and len(like) == len(held) else [None] * len(held)
    items = [decode(item, tensors, old, anew) for item, old in zip(held, olds, strict=True)]
    if isinstance(like, list | deque) and kind in ("list", "deque") and _is_of(like, kind, extra):
        like.clear()
        like.extend(items)
        return like
    if isinstance(like, set) and kind == "set":
        like.clear()
        like.update(items)
        return like
    if kind == "deque":
        return deque(items, maxlen=extra["length"])
    if "of" in extra:
        for named in [type(like), *(_classes(extra["in"]) if "in" in extra else ())]:
            if getattr(named, "__name__", "") == extra["of"] and hasattr(named, "_make"):
                return named._make(items)
        raise TypeError(f"no class {extra['of']} is loaded")
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "size": torch.Size}[kind](items)


def _is_of(like: list[Any] | deque[Any], kind: str, extra: Mapping[str, Any]) -> bool:
    """Whether a list or deque is of the kind, and the most items, that were saved."""
    return isinstance(like, deque) == (kind == "deque") and getattr(like, "maxlen", None) == extra.get("length")
