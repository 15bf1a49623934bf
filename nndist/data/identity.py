"""What tells a set of examples from another: checksums, which another machine's rounding does not change."""

from __future__ import annotations

import math
import os
import zlib
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

FEW, NEARLY = 16, 1e-3
"""Integers of an example that are compared exactly; how much means may differ."""


def checksum_of(part: Any, checksum: int = 0, about: list[float] | None = None) -> int:
    """A CRC-32 of a part of an example, continued.

    about: where floats and large tensors, such as images, leave a mean and a magnitude in place of their bits, which
    another machine or release of a library may round otherwise.
    """
    if isinstance(part, Tensor):
        array = part.detach().cpu().contiguous().flatten()
        if about is not None and (part.is_floating_point() or part.numel() > FEW):
            values = array.double() if not array.is_complex() else torch.view_as_real(array).double()
            about += [float(values.mean()), float(values.abs().mean())] if part.numel() else []
            part = str(list(part.shape))
        else:
            return zlib.crc32(array.view(torch.uint8).numpy().data if len(array) else b"", checksum)
    if isinstance(part, float) and about is not None:
        about += [part, abs(part)]
        part = None
    if isinstance(part, dict):
        part = [*part.items()]
    if is_dataclass(part) and not isinstance(part, type):
        part = [getattr(part, one.name) for one in fields(part)]
    if isinstance(part, list | tuple):
        for one in part:
            checksum = checksum_of(one, checksum, about)
        return checksum
    if hasattr(part, "__array__") or hasattr(part, "__array_interface__"):  # NumPy's, and images
        import numpy

        held: Any = numpy.asarray(part)
        is_numbers = held.size > 0 and held.dtype.kind in "biufc"
        plain = torch.as_tensor(held.tolist()) if is_numbers else repr(held.tolist())
        return checksum_of(plain, checksum, about)
    is_plain = part is None or isinstance(part, bool | int | float | str)
    return zlib.crc32(part if isinstance(part, bytes) else repr(part).encode() if is_plain else b"", checksum)


def same_examples(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same examples: of some of them, up to rounding."""
    if not one.startswith("some/") or not other.startswith("some/"):
        return one == other
    ours, theirs = one.split("/"), other.split("/")
    about, there = (list(map(float, parts[1].split())) for parts in (ours, theirs))
    if ours[2] != theirs[2] or len(about) != len(there):
        return False
    return all(
        math.isclose(value, value_there, rel_tol=0.0, abs_tol=NEARLY * max(about[place | 1], there[place | 1]))
        or (math.isnan(value) and math.isnan(value_there))
        for place, (value, value_there) in enumerate(zip(about, there, strict=True))
    )


def fingerprint_of_files(dataset: Any) -> str:
    """The CRC-32 of the names and classes of the files that a dataset lists as torchvision's ImageFolder does; else "".

    That is `samples`, a list of (path, class), below `root`.
    """
    samples, root = getattr(dataset, "samples", None), getattr(dataset, "root", None)
    if not isinstance(samples, list) or not isinstance(root, str | os.PathLike):
        return ""
    if not all(isinstance(sample, tuple) and len(sample) == 2 and isinstance(sample[0], str) for sample in samples):
        return ""
    names = (f"{path.removeprefix(os.fspath(root)).replace(os.sep, '/')} {label}" for path, label in samples)
    return f"{zlib.crc32(chr(10).join(names).encode('utf-8', 'surrogateescape')):08x}"
