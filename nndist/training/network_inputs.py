"""What each network is called with, as run.json keeps it: so that a network can be exported without the data."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError

Inputs = dict[str, list[dict[str, Any]]]
"""By network, of each input: its dtype, its shape without the examples', and the lowest and highest of its values.

Of rows of numbers, float [examples, columns], they are lists of one for each column; of other floats there are none.
"""
DTYPES = {str(one).removeprefix("torch."): one for one in (torch.float32, torch.float64, torch.int64, torch.int32)}
DTYPES |= {"uint8": torch.uint8, "bool": torch.bool}
MAX_COLUMNS = 256
MAX_NUMBERS = 10_000_000  # of one example


@contextlib.contextmanager
def noting(networks: Mapping[str, nn.Module], found: Inputs) -> Iterator[None]:
    """Context manager: records in `found` the first inputs of each network, if they are tensors [examples, ...].

    A compiled network is left out: a hook would compile it again.
    """
    handles: list[Any] = []

    def note(name: str, place: int, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        handles[place].remove()
        rows = {len(one) if isinstance(one, Tensor) and one.dim() else -1 for one in given}
        if named or len(rows) != 1 or -1 in rows or not all(str(one.dtype)[6:] in DTYPES for one in given):
            return
        with contextlib.suppress(RuntimeError):  # under torch.func.vmap a value can't be looked at
            found[name] = [described(one) for one in given]

    for name, network in networks.items():
        if name not in found and getattr(network, "_compiled_call_impl", None) is None:
            place = len(handles)
            hook = lambda _, given, named, name=name, place=place: note(name, place, given, named)  # noqa: E731
            handles.append(network.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def described(values: Tensor) -> dict[str, Any]:
    """An input's entry."""
    about: dict[str, Any] = {"dtype": str(values.dtype).removeprefix("torch."), "shape": list(values.shape[1:])}
    if not values.is_floating_point() and values.dtype != torch.bool and values.numel():
        about |= {"low": int(values.min()), "high": int(values.max())}
    if values.is_floating_point() and values.numel() and values.dim() <= 2 and values[0].numel() <= MAX_COLUMNS:
        rows = values.detach().reshape(len(values), -1).cpu()
        if bool(rows.isfinite().all()):
            about |= {"low": rows.amin(0).tolist(), "high": rows.amax(0).tolist()}
    return about


def made_up(entries: Any, size: int) -> tuple[Tensor, ...]:
    """Inputs of `size` examples like those described: random numbers in their range, floats from 0 to 1.

    Raises UserError if the entries are not as `described` makes them.
    """
    made = []
    try:
        for entry in entries:
            dtype, shape = DTYPES[entry["dtype"]], [int(length) for length in entry["shape"]]
            if min(shape, default=0) < 0 or math.prod(shape) > MAX_NUMBERS:
                raise ValueError(f"shape {shape}")
            if dtype.is_floating_point:
                made.append(torch.rand(size, *shape, dtype=dtype))
            else:
                low, high = (0, 1) if dtype == torch.bool else (int(entry.get("low", 0)), int(entry.get("high", 0)))
                made.append(torch.randint(low, high + 1, (size, *shape)).to(dtype))
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"run.json: inputs are damaged ({error}); restore it from a copy") from error
    return tuple(made)
