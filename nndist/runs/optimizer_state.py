"""Optimizer states as named tensors and JSON, and back."""

from __future__ import annotations

import enum
import math
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import UserError
from . import optimizer_places as places
from .checkpoint import DamagedCheckpoint, check_tensors
from .optimizer_places import NESTED
from .python_values import Unsavable, decode, encode

Tensors = dict[str, Tensor]
Json = dict[str, Any]
FILE = "optimizer.safetensors"
PRESENT = ("params", "foreach", "fused", "capturable", "differentiable")
"""The options of a parameter group that are the current launch's, whatever was saved."""


def begin(optimizers: Mapping[str, Optimizer], networks: Mapping[str, nn.Module]) -> None:
    """To be called before the first step: what the optimizers hold now is restored in place, as others may hold it."""
    for name, optimizer in optimizers.items():
        places.begin(name, optimizer, _parameter_names(name, optimizer, networks[name]))


def optimizer_state(optimizers: Mapping[str, Optimizer], networks: Mapping[str, nn.Module]) -> tuple[Tensors, Json]:
    """The optimizers' tensors by "<network>/<parameter>/<name>", and as JSON plain values and parameter groups.

    Raises UserError for what only pickle can hold.
    """
    tensors: Tensors = {}
    rest: Json = {}
    names = {name: _parameter_names(name, optimizer, networks[name]) for name, optimizer in optimizers.items()}
    first = {id(value): place for place, value in _objects(optimizers, names).items()}
    for name, optimizer in optimizers.items():
        rest[name] = _Saving(name, optimizer, names[name], tensors, first).saved()
    return tensors, rest


_OBJECTS = (Tensor, list, dict, set, deque, torch.Generator)
"""What may be held in several places, of which one may be changed in-place."""


class _Saving:
    """What is saved of one optimizer.

    first: by id, the first place of each object that may be held in several.
    """

    def __init__(
        self, name: str, optimizer: Optimizer, names: Mapping[Tensor, str], tensors: Tensors, first: dict[int, str]
    ) -> None:
        self.name, self.optimizer, self.names, self.tensors, self.first = name, optimizer, names, tensors, first
        self.started = places.started(optimizer)
        # values: what JSON holds of the state; keys: those that a place does not say; marks: of tensors with gradients
        self.values: Json = {}
        self.keys: Json = {}
        self.marks: Json = {}
        self.same: list[list[str]] = []  # places of one object
        self.kept: list[str] = []  # places of tensors that were there at the start

    def saved(self) -> Json:
        state = self.optimizer.state
        num_of_parameters = 0
        for number, (parameter, parameter_name) in enumerate(
            self.names.items()
        ):  # the state has another order on resume
            of_parameter = state.get(parameter)
            if isinstance(of_parameter, dict):
                num_of_parameters += 1
                for place, key, is_plain in places.state_places(self.name, parameter_name, of_parameter):
                    if not is_plain:
                        self.keys[place] = self._key(key)
                    self._add(place, number, of_parameter[key])
        others: list[Any] = []  # state that belongs to no parameter
        for key, value in state.items() if num_of_parameters < len(state) else ():
            if key not in self.names or not isinstance(value, dict):
                others.append([self._key(key), self._nested(value, str(len(others)))])
        groups = []
        for number, group in enumerate(self.optimizer.param_groups):
            about: Json = {"params": [self.names[parameter] for parameter in group["params"]]}
            for key in group.keys() - {"params"}:
                about[key] = _plain(group[key])
                if about[key] is None and group[key] is not None:
                    at = f"group {number}/{key}"
                    about[key] = {"nested": self._nested(group[key], at), "at": at}
                self._note(places.group_place(self.name, number, key), group[key])
            groups.append(about)
        found = {"class": type(self.optimizer).__name__, "groups": groups, "values": self.values, "others": others}
        more = {"keys": self.keys, "marks": self.marks, "same": self.same, "kept": self.kept}
        return {**found, **{key: value for key, value in more.items() if value}}

    def _add(self, place: str, number: int, value: Any) -> None:
        """Saves a value of a parameter's state. number: of the parameter, for the tensors in it."""
        self._note(place, value)
        if isinstance(value, Tensor):
            if not _is_savable(value):
                raise self._refusal(value)
            self.tensors[place] = value
            if (type(value) is not Tensor and isinstance(value, nn.Parameter)) or (
                value.requires_grad and value.is_leaf
            ):
                self.marks[place] = {"parameter": isinstance(value, nn.Parameter), "grad": value.requires_grad}
        elif value is None or (_is_number_or_text(value) and (not isinstance(value, float) or type(value) is float)):
            self.values[place] = _plain(value)
        else:
            at = f"{number}/{place.rpartition('/')[2]}"
            self.values[place] = {"nested": self._nested(value, at), "at": at}

    def _note(self, place: str, value: Any) -> None:
        """Notes whether an object is also elsewhere, and whether it is the one that was there at the start."""
        if not isinstance(value, _OBJECTS):
            return
        before = self.first.setdefault(id(value), place)
        if isinstance(value, Tensor) and place in self.started and self.started[place]() is value:
            self.kept.append(place)
        elif before != place:
            self.same.append([place, before])

    def _nested(self, value: Any, number: str) -> Any:
        own: Tensors = {}
        try:
            encoded = encode(value, own, alone=True)
        except Unsavable:
            raise self._refusal(value) from None
        self.tensors.update({f"{NESTED}{self.name}/{number}/{key}": tensor for key, tensor in own.items()})
        return encoded

    def _key(self, key: Any) -> Any:
        own: Tensors = {}
        try:
            encoded = None if isinstance(key, Tensor) else encode(key, own, alone=True)
        except Unsavable:
            own[""] = torch.empty(0)
        if own or isinstance(key, Tensor):
            of = "a parameter whose state is no dict" if key in self.names else f"a {_called(key)}"
            raise UserError(
                f"optimizer of {self.name!r}: its state has {of} as a key, which can't be saved; keep it under a "
                "string or number, or as an attribute of the optimizer"
            )
        return encoded

    def _refusal(self, value: Any) -> UserError:
        return UserError(
            f"optimizer of {self.name!r}: its state holds a {_called(_unsavable_in(value))}, which JSON and tensors "
            "can't hold; keep numbers, strings, tensors, or lists and dicts of them"
        )


def _objects(optimizers: Mapping[str, Optimizer], names: Mapping[str, Mapping[Tensor, str]]) -> dict[str, Any]:
    """Parameters, and the optimizers' attributes that were there at the start: a new process has them all, by place.

    names: of each network's parameters.
    """
    found: dict[str, Any] = {}
    for name, optimizer in optimizers.items():
        found |= {f"{NESTED}{name}/parameter {key}": parameter for parameter, key in names[name].items()}
        found |= {
            place: tensor
            for place, tensor in places.attributes(name, optimizer)
            if places.original(optimizer, place) is tensor and not isinstance(tensor, nn.Parameter)
        }
    return found


def copies(optimizers: Mapping[str, Optimizer], networks: Mapping[str, nn.Module]) -> list[str]:
    """State that shares memory with other tensors and will not in a resumed run, each in words."""
    return [
        line
        for name, optimizer in optimizers.items()
        for line in places.sharing_memory(name, optimizer, _parameter_names(name, optimizer, networks[name]))
    ]


def _is_savable(tensor: Tensor) -> bool:
    """Whether a safetensors file can hold a tensor."""
    is_plain = tensor.layout is torch.strided and not tensor.is_meta
    return is_plain and (tensor.dtype == torch.complex64 or not tensor.is_complex())


def _unsavable_in(value: Any) -> Any:
    """The innermost part of a value that can't be saved."""
    items = value.items() if isinstance(value, dict) else ()
    parts = [part for pair in items for part in pair]
    for part in [*parts, *(value if isinstance(value, list | tuple) else ())]:
        try:
            encode(part, None, alone=True)
        except Unsavable:
            return _unsavable_in(part)
    return value


def _called(value: Any) -> str:
    if isinstance(value, Tensor) and not _is_savable(value):
        kind = value.dtype if value.is_complex() else value.layout
        return f"{type(value).__name__} ({str(kind).removeprefix('torch.')})"
    if isinstance(value, defaultdict):
        return "defaultdict of a function of your own"
    return type(value).__name__


def load_optimizers(
    optimizers: Mapping[str, Optimizer],
    networks: Mapping[str, nn.Module],
    tensors: Tensors,
    rest: Json,
    *,
    groups_too: bool = True,
    rates_too: bool = True,
) -> None:
    """Restores what `optimizer_state` returned; raises DamagedCheckpoint, changing nothing, if it does not fit.

    A state tensor of torch's optimizers has the shape of its parameter, or (a step counter, or Adafactor's row sums)
    fewer dimensions or dimensions of 1. Parameters are matched by name, never by position. `groups_too`: also restore
    momentum, weight decay and the like, and groups that training added, but not the choice of kernels (PRESENT).
    `rates_too`: also restore the learning rates.
    """
    fitting = {
        name: _fitting(name, optimizer, networks[name], tensors, rest.get(name), groups_too)
        for name, optimizer in optimizers.items()
    }
    claimed = (NESTED, *(f"{name}/" for name in optimizers))
    unclaimed = [place for place in tensors if not place.startswith(claimed)]
    if unclaimed:
        raise DamagedCheckpoint(f"{FILE}: holds {min(unclaimed)}, which this recipe does not have")
    names = {name: _parameter_names(name, optimizer, networks[name]) for name, optimizer in optimizers.items()}
    objects = _objects(optimizers, names)
    holders: dict[str, tuple[dict[Any, Any], Any]] = {}  # by place
    for name, optimizer in optimizers.items():
        if groups_too:
            holders |= _load_groups(name, optimizer, networks[name], tensors, rest[name], rates_too)
        holders |= _load_states(optimizer, fitting[name], rest[name])
        for place, (key, value) in enumerate(rest[name].get("others", [])):
            optimizer.state[decode(key, {}, None)] = decode(value, _nested_tensors(tensors, name, str(place)), None)
    objects |= {place: holder[key] for place, (holder, key) in holders.items()}
    for place, first in [pair for name in optimizers for pair in rest[name].get("same", [])]:
        if place in holders and first in objects:
            holder, key = holders[place]
            holder[key] = objects[first]


class _Held(NamedTuple):
    place: str
    value: Any


def _fitting(
    name: str, optimizer: Optimizer, network: nn.Module, tensors: Tensors, saved: Json | None, groups_too: bool
) -> dict[Tensor, dict[Any, _Held]]:
    """What was saved for each parameter of an optimizer; raises DamagedCheckpoint if anything does not fit."""
    if saved is None or saved["class"] != type(optimizer).__name__:
        found = "nothing" if saved is None else saved["class"]
        raise DamagedCheckpoint(f"optimizer of {name}: {found} was saved, the recipe has {type(optimizer).__name__}")
    names = _parameter_names(name, optimizer, network)
    own_groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    saved_groups = [group["params"] for group in saved["groups"]]
    if own_groups != saved_groups and not groups_too:
        raise DamagedCheckpoint(f"optimizer of {name}: its parameter groups differ from the recipe's")
    by_name = {key: parameter for parameter, key in names.items()}
    if strange := [key for group in saved_groups for key in group if key not in by_name]:
        raise DamagedCheckpoint(f"optimizer of {name}: holds {strange[0]}, which the recipe does not have")
    states: dict[Tensor, dict[Any, _Held]] = {}
    keys = saved.get("keys", {})
    for place, value in [*tensors.items(), *saved["values"].items()]:
        if not place.startswith(f"{name}/") or place.startswith(NESTED):
            continue
        parameter_name, _, key = place.removeprefix(f"{name}/").rpartition("/")
        parameter = by_name.get(parameter_name)
        if parameter is None:
            raise DamagedCheckpoint(f"{FILE}: {place} belongs to no parameter of the recipe")
        # others may hold tensors of any shape, and LBFGS holds one of all parameters under the name of the first
        is_alike = type(optimizer).__module__.startswith("torch.") and not isinstance(optimizer, torch.optim.LBFGS)
        if is_alike and isinstance(value, Tensor) and value.dim() == parameter.dim():
            expected = [1 if n == 1 else m for n, m in zip(value.shape, parameter.shape, strict=True)]
            check_tensors({place: value.new_empty(expected)}, {place: value}, FILE)
        elif isinstance(value, dict) and "nested" in value:
            value = decode(value["nested"], _nested_tensors(tensors, name, value["at"]), None)
        elif isinstance(value, dict):
            value = _unplain(value)
        states.setdefault(parameter, {})[decode(keys[place], {}, None) if place in keys else key] = _Held(place, value)
    return states


def _load_groups(
    name: str, optimizer: Optimizer, network: nn.Module, tensors: Tensors, saved: Json, rates_too: bool
) -> dict[str, tuple[dict[Any, Any], Any]]:
    """Restores the saved parameter groups, which training may have added to, with all options but PRESENT.

    Returns the group and the key of each place.
    """
    by_name = {key: parameter for parameter, key in _parameter_names(name, optimizer, network).items()}
    wanted = [[by_name[key] for key in group["params"]] for group in saved["groups"]]
    own = optimizer.param_groups
    before = [dict(group) for group in own]  # keeps the tensors that are restored in place
    if [list(map(id, group["params"])) for group in own] != [list(map(id, members)) for members in wanted]:
        first = {key: own[0][key] for key in PRESENT if key in own[0] and key != "params"}
        own[:] = [{"params": members, **first} for members in wanted]
    left = PRESENT if rates_too else (*PRESENT, "lr")
    holders = {}
    for number, (group, saved_group) in enumerate(zip(own, saved["groups"], strict=True)):
        for key in saved_group.keys() - {*left}:
            value, place = saved_group[key], places.group_place(name, number, key)
            holders[place] = group, key
            if isinstance(value, dict) and "nested" in value:
                # another tensor that is there must not take the numbers: something else may hold it
                like = None if isinstance(group.get(key), Tensor) and "kept" in saved else group.get(key)
                found = decode(value["nested"], _nested_tensors(tensors, name, value["at"]), like)
            else:
                found = _unplain(value)
            group[key] = _in_place(optimizer, place, found, saved)
    del before
    return holders


def _load_states(
    optimizer: Optimizer, states: Mapping[Tensor, dict[Any, _Held]], saved: Json
) -> dict[str, tuple[dict[Any, Any], Any]]:
    """Restores the saved state of each parameter, on the device that the optimizer's kernels need.

    Returns the parameter's state and the key of each place.
    """
    on_device = {
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if group.get("fused") or group.get("capturable")
    }
    before = dict(optimizer.state)  # keeps the tensors that are restored in place
    optimizer.state.clear()
    marks = saved.get("marks", {})
    holders: dict[str, tuple[dict[Any, Any], Any]] = {}
    for parameter, state in states.items():
        made: dict[Any, Any] = {}
        for key, (place, value) in state.items():
            if isinstance(value, Tensor):
                counters_too = parameter in on_device
                value = _in_place(optimizer, place, value, saved, partial(_placed, parameter, counters_too))
            if place in marks:
                grad = marks[place]["grad"]
                value = nn.Parameter(value, grad) if marks[place]["parameter"] else value.requires_grad_(grad)
            made[key] = value
            holders[place] = made, key
        optimizer.state[parameter] = made
    del before
    return holders


def _in_place(
    optimizer: Optimizer, place: str, value: Any, saved: Json, placed: Callable[[Any], Any] = lambda value: value
) -> Any:
    """The tensor that the new optimizer has in a place, with the saved numbers, if it was there all the time.

    Otherwise what `placed` makes of the value.
    """
    target = places.original(optimizer, place) if place in saved.get("kept", ()) else None
    if target is None or not places.fits(target, value):
        return placed(value)
    with torch.no_grad():
        target.copy_(value)
    return target


def _nested_tensors(tensors: Tensors, name: str, at: str) -> Tensors:
    prefix = f"{NESTED}{name}/{at}/"
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _placed(parameter: Tensor, counters_too: bool, value: Tensor) -> Tensor:
    """A state tensor on its parameter's device, in its layout; step counters too if `counters_too`."""
    if value.dim() == 0 and not counters_too:
        return value.clone()
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return value.to(parameter.device, copy=True)


def check_parameters(optimizers: Mapping[str, Optimizer], networks: Mapping[str, nn.Module]) -> None:
    """Raises UserError if an optimizer holds a parameter outside its network, as `optimizer_state` does."""
    for name, optimizer in optimizers.items():
        _parameter_names(name, optimizer, networks[name])


def _parameter_names(name: str, optimizer: Optimizer, network: nn.Module) -> dict[Tensor, str]:
    names: dict[Tensor, str] = {parameter: parameter_name for parameter_name, parameter in network.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                raise UserError(
                    f"the optimizer of {name!r} holds a parameter that is not in that network, and would not be saved"
                )
    return names


def _is_number_or_text(value: Any) -> bool:
    """Whether a value is one of Python's own; not a member of an enum or NumPy's, which would come back as another."""
    is_other = isinstance(value, enum.Enum) or hasattr(value, "dtype")
    return isinstance(value, bool | int | float | str) and not is_other


def _plain(value: Any) -> Any:
    """A value as JSON; None for what `encode` has to hold."""
    if isinstance(value, Tensor):
        is_plain = value.dim() == 0 and value.layout == torch.strided and value.device.type == "cpu"
        if not is_plain or value.is_complex() or value.requires_grad or not value.isfinite():
            return None
        return {"tensor": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, float) and _is_number_or_text(value) and not math.isfinite(value):
        return {"float": str(value)}  # JSON has no infinity
    if value is None or _is_number_or_text(value):
        return value
    if type(value) is tuple and all(
        type(item) in (bool, int) or (type(item) is float and math.isfinite(item)) for item in value
    ):
        return list(value)
    return None


def _unplain(value: Any) -> Any:
    if isinstance(value, dict):
        if "encoded" in value:
            return decode(value["encoded"], {}, None)
        if "tensor" in value:
            kind = getattr(torch, value["dtype"]) if "dtype" in value else None
            return torch.tensor(value["tensor"], dtype=kind)
        return float(value["float"])
    return tuple(value) if isinstance(value, list) else value
