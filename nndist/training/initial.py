"""`--init-from`: another training's weights copied into new networks by name; the plan lists what did not match."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.runtime import Runtime
from ..errors import UserError
from ..recipe.contract import Recipe, meant
from ..recipe.scaling import Scaled
from ..runs.checkpoint import network_tensors
from ..runs.network_state import own_tensors
from ..runs.weights import Source, read_weights

SHOWN = 4  # names in a line of the table
MOST_PREFIXES = 40
WRAPPERS = re.compile(r"\.(?:base_layer|original_module|modules_to_save\.default|(?<=[AB]\.)default)(?=\.)")
"""What peft adds to the names of layers that LoRA adapts or replaces, and of adapters: "0.base_layer.weight"."""


@dataclass
class Initial:
    """Tensors by name: loaded, missing from the file, unexpected in it, of another shape there, or kept unchanged."""

    place: str
    text: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    other_shapes: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    renamed: str = ""
    numbers: int = 0

    def note(self) -> str:
        """A compact table for the plan."""
        total = len(self.loaded) + len(self.missing) + len(self.other_shapes)
        amount = f"{len(self.loaded):,} of {total:,} tensors, {self.numbers:,} numbers"
        lines = [f"--init-from {self.place}: {amount}, of {self.text}"]
        table = {
            "names": [self.renamed] if self.renamed else [],
            "other shape": self.other_shapes,
            "missing": self.missing,
            "unexpected": self.unexpected,
            "kept": self.kept,
        }
        lines += [f"{title:<12} {_some(names)}" for title, names in table.items() if names]
        return f"\n{'':9}".join(lines)

    def about(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "from": self.place,
            "weights": self.text,
            "loaded": len(self.loaded),
            "missing": self.missing,
            "unexpected": self.unexpected,
            "other_shapes": self.other_shapes,
        }


def _some(names: list[str]) -> str:
    return "; ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


def load_initial(networks: Mapping[str, nn.Module], recipe: Recipe, runtime: Runtime) -> Initial | None:
    """Loads the weights that `--init-from` names, on each process; None without the flag.

    Raises UserError, on all processes, for what can't be read, is not the same on all, or has no tensor that fits.
    """
    place = meant(recipe, "init_from")
    if place is None:
        return None
    source, error = Source({}, ""), ""
    for may_download in (True, False):  # one process of each machine may, the others then find the file
        if runtime.is_local_main == may_download:
            try:
                source = read_weights(place, download=may_download)
            except UserError as mistake:
                error = str(mistake)
        runtime.barrier()
    found = runtime.gather_objects([error, _checksum(source.tensors) if runtime.world_size > 1 else 0])
    for reason, checksum in found:
        if reason:
            raise UserError(reason)
        if checksum != found[0][1]:
            raise UserError(f"--init-from {place}: the machines have different files; put the same on each")
    return put(networks, source, place)


def put(networks: Mapping[str, nn.Module], source: Source, place: str) -> Initial:
    """Copies the tensors whose names and shapes are those of the networks; raises UserError if there are none.

    A prefix that all names have on one side only, such as "module.", is left out, and so is what peft adds to the names
    of layers. The means and standard deviations of `Scaled` stay those of the recipe's own data.
    """
    own = network_tensors({name: own_tensors(network) for name, network in networks.items()})
    scalings = network_tensors({name: _scalings(network) for name, network in networks.items()})
    shapes = {WRAPPERS.sub("", name): tensor.shape for name, tensor in own.items()}
    shapes |= {name: tensor.shape for name, tensor in own.items()}
    remove, add, other = best_prefixes(shapes, {name: tensor.shape for name, tensor in source.tensors.items()})
    given = {
        add + name.removeprefix(remove): tensor for name, tensor in source.tensors.items() if name.startswith(remove)
    }
    initial = Initial(place, source.text)
    if remove or add:
        initial.renamed = " and ".join(
            [*([f"without {remove!r}"] if remove else []), *([f"with {add!r}"] if add else [])]
        )
    if other:
        initial.renamed += f" (as many fit without {other!r}: give a file of that part's state_dict() to take it)"
    others = [name for name in source.tensors if not name.startswith(remove)]
    theirs = {name: name if name in given else WRAPPERS.sub("", name) for name in own}  # own name -> the file's
    initial.unexpected = [*(name for name in given if name not in theirs.values()), *others]
    with torch.no_grad():
        for name, tensor in own.items():
            found = given.get(theirs[name])
            if name in scalings:
                initial.kept.append(name)
            elif found is None:
                initial.missing.append(name)
            elif found.shape != tensor.shape:
                initial.other_shapes.append(f"{name} {list(tensor.shape)}, there {list(found.shape)}")
            else:
                tensor.copy_(found)
                initial.loaded.append(name)
                initial.numbers += tensor.numel()
    if not initial.loaded:
        there, here = (_some([f"{n} {list(t.shape)}" for n, t in some.items()]) for some in (source.tensors, own))
        raise UserError(
            f"--init-from {place}: none of its {len(source.tensors):,} tensors fits this recipe's networks; it has "
            f"{there or 'nothing'}, the recipe {here}"
        )
    return initial


def _scalings(network: nn.Module) -> dict[str, Tensor]:
    """The means and standard deviations in the network's `Scaled` modules."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in network.named_modules()
        if isinstance(module, Scaled)
        for name, buffer in module.named_buffers(recurse=False)
    }


def best_prefixes(own: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, str, str]:
    """What to remove from the start of the file's names, and to add, so that most names and shapes agree.

    And what else could be removed so that as many other tensors of the file agree, such as those of a decoder that is
    built as the encoder is; else "".
    """
    pairs = [(remove, add) for remove in _prefixes(theirs) for add in _prefixes(own)]

    def fitting(pair: tuple[str, str]) -> int:
        remove, add = pair
        named = (add + name.removeprefix(remove) for name in theirs if name.startswith(remove))
        return sum(own.get(new) == theirs[remove + new.removeprefix(add)] for new in named if new in own)

    count = {pair: fitting(pair) for pair in pairs}
    remove, add = max(pairs, key=lambda pair: (count[pair], -len(pair[0]) - len(pair[1])))
    as_many = [other for other, _ in pairs if count[other, add] == count[remove, add] > 0]
    apart = [other for other in as_many if not other.startswith(remove) and not remove.startswith(other)]
    return remove, add, next(iter(apart), "")


def _prefixes(names: Iterable[str]) -> list[str]:
    """The beginnings of names, of up to two parts, such as "", "module." and "module.backbone."."""
    found = {"": None}
    for name in names:
        parts = name.split(".")
        found |= dict.fromkeys("".join(f"{part}." for part in parts[:count]) for count in (1, 2) if count < len(parts))
    return list(found)[:MOST_PREFIXES]


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    checksum = 0
    for name, tensor in tensors.items():
        checksum = zlib.crc32(name.encode(), checksum)
        checksum = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data, checksum)
    return checksum
