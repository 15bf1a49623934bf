"""A process's random state as named tensors and JSON, and back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]
Json = dict[str, Any]


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


def is_random_state(state: tuple[Tensors, Json], device: torch.device) -> bool:
    """Whether this process's random state still is what `random_state` returned."""
    tensors, rest = random_state(device)
    before, rest_before = state
    return rest == rest_before and all(torch.equal(tensors[name], before[name]) for name in tensors if name in before)


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
