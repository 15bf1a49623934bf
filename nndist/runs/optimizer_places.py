"""Where an optimizer holds which objects: what was there at the start, what is held twice, what shares memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..distributed.blocks import local
from .python_marks import memory_of, objects_in

NESTED = "nested/"
"""Prefix of places, and of tensors, that are not "<network>/<parameter>/<name of a state tensor>"."""

_started: weakref.WeakKeyDictionary[Optimizer, dict[str, weakref.ref[Tensor]]] = weakref.WeakKeyDictionary()


def state_places(name: str, parameter_name: str, state: Mapping[Any, Any]) -> list[tuple[str, Any, bool]]:
    """A place for each key of a parameter's state, the key, and whether the place says it in full: a plain string."""
    prefix = f"{name}/{parameter_name}/"
    if all(type(key) is str and "/" not in key for key in state):  # as of torch's own optimizers
        return [(prefix + key, key, True) for key in state]
    texts: set[str] = set()
    found = []
    for key in sorted(state, key=lambda key: type(key) is not str or "/" in key):  # plain ones first: as they are
        text = str(key).replace("/", "|")
        while text in texts:  # such as 0 and "0"
            text += "'"
        texts.add(text)
        found.append((prefix + text, key, type(key) is str and text == key))
    return found


def group_place(name: str, number: int, key: str) -> str:
    """The place of an option of a parameter group."""
    return f"{NESTED}{name}/group {number}/{key}"


def attributes(name: str, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The tensors that are attributes of an optimizer, or items of one, with their places."""
    for key in vars(optimizer).keys() - {"param_groups", "state", "defaults"}:
        value = vars(optimizer)[key]
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        for part, item in [("", value), *((f"[{number}]", item) for number, item in enumerate(items))]:
            if isinstance(item, Tensor):
                yield f"{NESTED}{name}/attribute {key}{part}", item


def _tensors(name: str, optimizer: Optimizer, names: Mapping[Tensor, str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors directly in an optimizer's attributes, groups and state, with their places."""
    yield from attributes(name, optimizer)
    for number, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if isinstance(value, Tensor):
                yield group_place(name, number, key), value
    for parameter, state in optimizer.state.items():
        if isinstance(parameter, Tensor) and parameter in names and isinstance(state, dict):
            for place, key, _ in state_places(name, names[parameter], state):
                if isinstance(state[key], Tensor):
                    yield place, state[key]


def begin(name: str, optimizer: Optimizer, names: Mapping[Tensor, str]) -> None:
    """Remembers which tensors a new optimizer holds; others, such as the recipe's hooks, may hold them, too."""
    _started[optimizer] = {place: weakref.ref(tensor) for place, tensor in _tensors(name, optimizer, names)}


def started(optimizer: Optimizer) -> Mapping[str, weakref.ref[Tensor]]:
    """The tensors that an optimizer held when it was new, by place."""
    return _started.get(optimizer, {})


def original(optimizer: Optimizer, place: str) -> Tensor | None:
    """The tensor that was in a place when the optimizer was new, if it still exists."""
    reference = started(optimizer).get(place)
    return None if reference is None else reference()


def fits(target: Tensor | None, value: Any) -> bool:
    """Whether a tensor can take the numbers of another one."""
    if target is None or not isinstance(value, Tensor) or hasattr(target, "to_local") != hasattr(value, "to_local"):
        return False
    alike = target.shape == value.shape and target.dtype == value.dtype and target.layout == value.layout
    return alike and 0 not in target.stride()


def sharing_memory(name: str, optimizer: Optimizer, names: Mapping[Tensor, str]) -> list[str]:
    """Tensors of the state that share memory with another tensor, and would come back as copies: each in words.

    Those that were there when the optimizer was new share it in a resumed run, too, and so does what is one object.
    """
    # by memory and object: words, or the key and the parameter of a state; most of 10,000 tensors share none
    by_memory: dict[int, dict[int, tuple[Any, Tensor]]] = {}
    originals = {id(reference()) for reference in started(optimizer).values()}
    for place, tensor in attributes(name, optimizer):
        if (memory := memory_of(tensor)) is not None:
            # one that was made later is another object than the state's in a resumed run
            at = id(tensor) if original(optimizer, place) is tensor else -id(tensor)
            words = "its attribute " + place.partition("/attribute ")[2]
            by_memory.setdefault(memory, {}).setdefault(at, (words, tensor))
    for parameter, state in optimizer.state.items():
        if isinstance(parameter, Tensor) and parameter in names and isinstance(state, dict):
            for key, value in state.items():
                for tensor in (value,) if type(value) is Tensor else objects_in(value):
                    if isinstance(tensor, Tensor) and (memory := memory_of(tensor)) is not None:
                        by_memory.setdefault(memory, {}).setdefault(id(tensor), ((key, parameter), tensor))
    own = {id(parameter) for parameter in names}  # of the network: an optimizer may lend it memory in a step
    found = []
    for tensors in by_memory.values():
        if len(tensors) == 1:
            continue
        held = [
            (where if isinstance(where, str) else f"its state {where[0]!r} of {names[where[1]]}", where, tensor)
            for at, (where, tensor) in tensors.items()
            if abs(at) not in own
        ]
        in_state = [said for said, where, one in held if where is not said and id(one) not in originals]
        if len(held) > 1 and in_state and _overlap([tensor for _, _, tensor in held]):
            other = next(said for said, _, _ in held if said != in_state[-1])
            found.append(f"optimizer of {name!r}: {in_state[-1]} shares memory with {other}")
    return found


def _overlap(tensors: list[Tensor]) -> bool:
    """Whether some of the tensors in one block of memory have a number in common."""
    found = [local(tensor.detach()) for tensor in tensors]
    if len({tensor.dtype for tensor in found}) > 1:
        return True
    taken = torch.zeros(found[0].untyped_storage().nbytes() // found[0].element_size(), dtype=torch.bool)
    for tensor in found:
        sizes = [1 if step == 0 else size for size, step in zip(tensor.shape, tensor.stride(), strict=True)]
        part = taken.as_strided(sizes, tensor.stride(), tensor.storage_offset())
        if part.any():
            return True
        part.fill_(True)
    return False
