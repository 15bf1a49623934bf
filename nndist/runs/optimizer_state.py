"""Optimizer states and random states as named tensors and JSON, and back."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import UserError
from .checkpoint import DamagedCheckpoint, check_tensors
from .python_values import Unsavable, decode, encode

Tensors = dict[str, Tensor]
Json = dict[str, Any]
FILE = "optimizer.safetensors"
PRESENT = ("params", "foreach", "fused", "capturable", "differentiable")
"""The options of a parameter group that are the current launch's, whatever was saved."""

NESTED = "nested/"  # prefix of tensors inside lists or dicts of an optimizer's state


def optimizer_state(optimizers: Mapping[str, Optimizer], networks: Mapping[str, nn.Module]) -> tuple[Tensors, Json]:
    """The optimizers' tensors by "<network>/<parameter>/<name>", and as JSON plain values and parameter groups.

    Raises UserError for what only pickle can hold.
    """
    tensors: Tensors = {}
    rest: Json = {}
    for name, optimizer in optimizers.items():
        names = _parameter_names(name, optimizer, networks[name])
        values: Json = {}
        others: list[Any] = []  # state that belongs to no parameter

        def nested(value: Any, number: str, name: str = name) -> Any:
            own: Tensors = {}
            try:
                encoded = encode(value, own)
            except Unsavable:
                raise UserError(
                    f"optimizer of {name!r}: its state holds a {type(value).__name__}, which JSON and tensors can't "
                    "hold; keep numbers, strings, tensors, or lists and dicts of them"
                ) from None
            tensors.update({f"{NESTED}{name}/{number}/{key}": tensor for key, tensor in own.items()})
            return encoded

        for place, (parameter, state) in enumerate(optimizer.state.items()):
            if not isinstance(parameter, Tensor) or not isinstance(state, dict):
                others.append([encode(parameter, {}), nested(state, str(place))])
                continue
            for key, value in state.items():
                where = f"{name}/{names[parameter]}/{key}"
                if isinstance(value, Tensor):
                    tensors[where] = value
                elif value is None or isinstance(value, bool | int | str) or type(value) is float:
                    values[where] = _plain(value)
                else:
                    values[where] = {"nested": nested(value, f"{place}/{key}"), "at": f"{place}/{key}"}
        groups = []
        for place, group in enumerate(optimizer.param_groups):
            about: Json = {"params": [names[parameter] for parameter in group["params"]]}
            for key in group.keys() - {"params"}:
                about[key] = _plain(group[key])
                if about[key] is None and group[key] is not None:
                    at = f"group {place}/{key}"
                    about[key] = {"nested": nested(group[key], at), "at": at}
            groups.append(about)
        rest[name] = {"class": type(optimizer).__name__, "groups": groups, "values": values, "others": others}
    return tensors, rest


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
    for name, optimizer in optimizers.items():
        if groups_too:
            _load_groups(name, optimizer, networks[name], tensors, rest[name]["groups"], rates_too)
        _load_states(optimizer, fitting[name])
        for place, (key, value) in enumerate(rest[name].get("others", [])):
            optimizer.state[decode(key, {}, None)] = decode(value, _nested_tensors(tensors, name, str(place)), None)


def _fitting(
    name: str, optimizer: Optimizer, network: nn.Module, tensors: Tensors, saved: Json | None, groups_too: bool
) -> dict[Tensor, Json]:
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
    states: dict[Tensor, Json] = {}
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
        states.setdefault(parameter, {})[key] = value
    return states


def _load_groups(
    name: str, optimizer: Optimizer, network: nn.Module, tensors: Tensors, groups: Sequence[Json], rates_too: bool
) -> None:
    """Restores the saved parameter groups, which training may have added to, with all options but PRESENT."""
    by_name = {key: parameter for parameter, key in _parameter_names(name, optimizer, network).items()}
    wanted = [[by_name[key] for key in group["params"]] for group in groups]
    own = optimizer.param_groups
    if [list(map(id, group["params"])) for group in own] != [list(map(id, members)) for members in wanted]:
        first = {key: own[0][key] for key in PRESENT if key in own[0] and key != "params"}
        own[:] = [{"params": members, **first} for members in wanted]
    left = PRESENT if rates_too else (*PRESENT, "lr")
    for group, saved_group in zip(own, groups, strict=True):
        for key in saved_group.keys() - {*left}:
            value = saved_group[key]
            if isinstance(value, dict) and "nested" in value:
                group[key] = decode(value["nested"], _nested_tensors(tensors, name, value["at"]), group.get(key))
            else:
                group[key] = _unplain(value)


def _load_states(optimizer: Optimizer, states: Mapping[Tensor, Json]) -> None:
    """Restores the saved state of each parameter, on the device that the optimizer's kernels need."""
    on_device = {
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if group.get("fused") or group.get("capturable")
    }
    optimizer.state.clear()
    for parameter, state in states.items():
        optimizer.state[parameter] = {
            key: _placed(value, parameter, parameter in on_device) if isinstance(value, Tensor) else value
            for key, value in state.items()
        }


def _nested_tensors(tensors: Tensors, name: str, at: str) -> Tensors:
    prefix = f"{NESTED}{name}/{at}/"
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _placed(value: Tensor, parameter: Tensor, counters_too: bool) -> Tensor:
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


def _plain(value: Any) -> Any:
    """A value as JSON; None for what `encode` has to hold."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return {"tensor": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}  # JSON has no infinity
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple) and all(isinstance(item, bool | int | float) for item in value):
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


# Random state.


def random_state(device: torch.device) -> tuple[Tensors, Json]:
    """This process's random state: Python's and NumPy's, each with its cached Gaussian, torch's, and this GPU's."""
    version, numbers, cached = random.getstate()
    tensors = {
        "python": torch.tensor(numbers, dtype=torch.int64),
        "torch": torch.get_rng_state(),
    }
    rest: Json = {"python": [version, cached]}
    with contextlib.suppress(ImportError):
        import numpy

        found: Json = dict(numpy.random.get_state(legacy=False))
        tensors["numpy"] = torch.from_numpy(found["state"]["key"].astype("int64"))
        rest["numpy"] = [int(found["state"]["pos"]), int(found["has_gauss"]), float(found["gauss"])]
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        tensors["mps"] = torch.mps.get_rng_state()
    return tensors, rest


def set_random_state(tensors: Tensors, rest: Json, device: torch.device) -> None:
    """Restores what `random_state` returned."""
    version, cached = rest["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), cached))
    torch.set_rng_state(tensors["torch"])
    if "numpy" in tensors:
        import numpy

        position, has_gauss, gauss = rest["numpy"]
        numpy.random.set_state(("MT19937", tensors["numpy"].numpy().astype("uint32"), position, has_gauss, gauss))
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
    if device.type == "mps" and "mps" in tensors:
        torch.mps.set_rng_state(tensors["mps"])


def repeatable(networks: Mapping[str, nn.Module], device: torch.device) -> Callable[[], None]:
    """Returns a function that resets random state and buffers to what they are now."""
    modules = [m for n in networks.values() for m in n.modules() if not isinstance(m, torch.jit.ScriptModule)]
    buffers = [(m._buffers, k, b, b.clone()) for m in modules for k, b in m._buffers.items() if b is not None]
    random = random_state(device)

    @torch.no_grad()
    def repeat() -> None:
        set_random_state(*random, device)
        for of_module, key, buffer, value in buffers:
            # what is not changed keeps its version, by which changes are noticed
            if buffer.layout != torch.strided or not torch.equal(buffer, value):
                buffer.copy_(value)
            of_module[key] = buffer  # the network may have replaced the tensor

    return repeat


def pack(tensors: Tensors) -> Tensor:
    """int64 and uint8 tensors concatenated in order of name, as one uint8 tensor that processes can exchange."""
    return torch.cat([tensors[name].contiguous().view(torch.uint8) for name in sorted(tensors)])


def unpack(data: Tensor, like: Tensors) -> Tensors:
    """Inverse of `pack`; `like` has the names, shapes and dtypes."""
    sizes = [like[name].numel() * like[name].element_size() for name in sorted(like)]
    parts = zip(sorted(like), data.cpu().split(sizes), strict=True)
    return {name: part.clone().view(like[name].dtype).reshape(like[name].shape) for name, part in parts}
