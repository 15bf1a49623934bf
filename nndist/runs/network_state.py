"""The tensors of networks by name, whatever state_dict hooks do to them, and their extra state."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..distributed.blocks import is_sharded
from ..errors import UserError
from ..torch_internals import non_persistent_buffers
from .checkpoint import DamagedCheckpoint, check_tensors, network_tensors
from .python_values import Unsavable, decode, encode

Networks = Mapping[str, nn.Module]
Names = Mapping[str, Collection[str]]
EXTRA = "_extra_state"  # suffix of its name in a state_dict


def own_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, not copied; tied ones under each of their names."""
    tensors: dict[str, Tensor] = dict(network.named_parameters(remove_duplicate=False))
    for prefix, module in network.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if name not in non_persistent_buffers(module):
                tensors[f"{prefix}.{name}" if prefix else name] = buffer
    return tensors


def shown_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of the network's state_dict, which its hooks may have derived from other tensors."""
    return {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}


def shows_itself(network: nn.Module) -> bool:
    """Whether the tensors in the state_dict are exactly the network's own."""
    if is_sharded(network):
        return True
    own = own_tensors(network)
    shown = {name: t for name, t in shown_tensors(network).items() if not name.endswith(EXTRA)}
    return own.keys() == shown.keys() and all(
        own[name].data_ptr() == tensor.data_ptr() and own[name].shape == tensor.shape for name, tensor in shown.items()
    )


def files_of(networks: Networks, names: Names) -> dict[str, dict[str, Tensor]]:
    """The files of a checkpoint: model.safetensors, and own.safetensors if state_dict hooks change the tensors.

    model.safetensors is what other programs read. Tensors that a hook hides can't be restored from what it derives, so
    own.safetensors holds them unchanged. names: as of `check_names`; what a network has gained since is left out.
    """
    own = {name: own_tensors(network) for name, network in networks.items()}
    gained = {name: own[name].keys() - names[name] for name in networks}
    shown = {
        name: {k: t for k, t in shown_tensors(network).items() if not k.endswith(EXTRA) and k not in gained[name]}
        for name, network in networks.items()
    }
    files = {"model.safetensors": network_tensors(shown)}
    if not all(map(shows_itself, networks.values())):
        kept = {name: {k: t for k, t in tensors.items() if k not in gained[name]} for name, tensors in own.items()}
        files["own.safetensors"] = network_tensors(kept)
    return files


def check_names(networks: Networks, names: Names) -> None:
    """Raises UserError for a tensor that a network has gained in training, as a freshly built one lacks it.

    names: those at the start, by network. A second name of one of their tensors is none, as it is left out.
    """
    for name, network in networks.items():
        own = own_tensors(network)
        known = {id(tensor) for key, tensor in own.items() if key in names[name]}
        for key, tensor in own.items():
            if key not in names[name] and id(tensor) not in known:
                kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
                raise UserError(
                    f"{name}.{key}: the network has gained this {kind} while it trains, so the run could be neither "
                    "resumed nor used; make it in __init__, or keep it as a plain attribute"
                )


def check_replaced(
    networks: Networks, parameters: Mapping[str, Mapping[str, Tensor]], trained: Mapping[str, Collection[Tensor]]
) -> None:
    """Raises UserError for a parameter that an optimizer trains and its network has replaced by another tensor.

    parameters: those at the start, by network and name. trained: the parameters of each network's optimizer.
    """
    for name, network in networks.items():
        own = {id(parameter) for parameter in network.parameters()}
        lost = {id(parameter) for parameter in trained[name]} - own
        for key, parameter in parameters[name].items() if lost else ():
            if id(parameter) in lost:
                raise UserError(
                    f"{name}.{key}: the network replaces this parameter while it trains, in forward() or a hook, so "
                    "that its optimizer changes what nothing uses; change its values in place, or set what forward() "
                    "computes as a plain attribute under another name"
                )


def load(networks: Networks, files: Mapping[str, Mapping[str, Tensor]], averaged: bool = False) -> None:
    """Copies the tensors of a checkpoint into freshly built networks; `averaged`: the EMA weights.

    Raises DamagedCheckpoint, changing nothing, if a name, dtype, or the shape of a parameter differs. A buffer gets the
    saved shape: some grow in training.
    """
    file = "ema.safetensors" if averaged else "own.safetensors" if "own.safetensors" in files else "model.safetensors"
    tensors = files[file]
    _initialise_lazy_layers(networks, tensors)
    own = network_tensors({name: own_tensors(network) for name, network in networks.items()})
    resized = {
        name: place
        for name, place in _places_of_buffers(networks).items()
        if name in tensors and tensors[name].shape != own[name].shape
    }
    check_tensors({name: tensors[name] if name in resized else tensor for name, tensor in own.items()}, tensors, file)
    for name, (module, key) in resized.items():
        module._buffers[key] = own[name] = own[name].new_empty(tensors[name].shape)
    with torch.no_grad():
        for name, tensor in own.items():
            if 0 in tensor.stride() and torch.equal(tensor.cpu(), tensors[name]):
                continue  # expanded: can't be copied into, and is unchanged
            tensor.copy_(tensors[name])


def _places_of_buffers(networks: Networks) -> dict[str, tuple[nn.Module, str]]:
    """The module and key of each persistent buffer of networks that are not sharded, by its name in a checkpoint."""
    return {
        ".".join(filter(None, [name if len(networks) > 1 else "", prefix, key])): (module, key)
        for name, network in networks.items()
        if not is_sharded(network)
        for prefix, module in network.named_modules(remove_duplicate=False)
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in non_persistent_buffers(module)
    }


def check_savable(networks: Networks) -> None:
    """Raises UserError for a tensor whose dtype a checkpoint can't hold."""
    for name, network in networks.items():
        for key, tensor in own_tensors(network).items():
            if tensor.dtype == torch.complex128:
                raise UserError(
                    f"{name}.{key}: is complex128, which safetensors can't hold; use complex64, or two tensors"
                )


def is_lazy(network: nn.Module) -> bool:
    """Whether a layer still has to infer its shape from its first input."""
    tensors = (*network.parameters(), *network.buffers())
    return any(isinstance(tensor, UninitializedParameter | UninitializedBuffer) for tensor in tensors)


def _initialise_lazy_layers(networks: Networks, tensors: Mapping[str, Tensor]) -> None:
    """Gives lazy layers the saved shapes, as torch's load_state_dict does."""
    for name, network in networks.items():
        if is_lazy(network):
            prefix = "" if len(networks) == 1 else f"{name}."
            state = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            try:
                network.load_state_dict(state, strict=False)
            except RuntimeError as error:
                raise DamagedCheckpoint(f"model.safetensors: does not fit {name}: {error}") from error


def extra_states(networks: Networks) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What modules return from get_extra_state, as JSON and tensors; raises UserError for what only pickle can hold."""
    found: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for place, module in _with_extra_state(networks):
        own: dict[str, Tensor] = {}
        try:
            value = encode(module.get_extra_state(), own)
        except Unsavable:
            raise UserError(
                f"{place}: get_extra_state() of {type(module).__name__} returns what JSON and tensors can't hold; "
                "return numbers, strings, tensors, or lists and dicts of them"
            ) from None
        found[place] = value
        tensors |= {f"{place}/{name}": tensor for name, tensor in own.items()}
    return found, tensors


def set_extra_states(networks: Networks, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Restores what `extra_states` returned."""
    for place, module in _with_extra_state(networks):
        if place in saved:
            prefix = f"{place}/"
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            module.set_extra_state(decode(saved[place], own, None))


def _with_extra_state(networks: Networks) -> list[tuple[str, nn.Module]]:
    return [
        (f"{name}.{prefix}".rstrip("."), module)
        for name, network in networks.items()
        for prefix, module in network.named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    ]
