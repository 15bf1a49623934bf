"""A memory limit for building a run's networks, since its run.json may ask for any width."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import UserError

SLACK_BYTES = 1 << 30  # for what networks hold but do not save, and for temporaries while they are built
SLACK_TENSORS = 5_000
MAKERS = {torch.rand, torch.randn, torch.randint, torch.randperm}
MAKERS |= {torch.empty, torch.empty_strided, torch.zeros, torch.ones, torch.full, torch.eye}
MAKERS |= {torch.arange, torch.linspace, torch.logspace}
"""The functions that create a tensor from a size alone, as layers do."""


class Budget(TorchFunctionMode):
    """Context manager: limits the memory of newly created tensors; raises UserError before exceeding it.

    folder: of the run. saved: the tensors of a checkpoint by file and name; the networks need about as much memory.
    """

    def __init__(self, folder: Path, saved: Mapping[str, Mapping[str, Tensor]]):
        super().__init__()
        self.folder = folder
        tensors = [tensor for of_file in saved.values() for tensor in of_file.values()]
        self.saved_bytes = sum(tensor.nbytes for tensor in tensors)
        self.bytes_left = 4 * self.saved_bytes + SLACK_BYTES
        self.tensors_left = 100 * len(tensors) + SLACK_TENSORS

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MAKERS:
            plan = {name: value for name, value in kwargs.items() if name not in ("generator", "pin_memory", "out")}
            with contextlib.suppress(TypeError, RuntimeError):  # invalid calls raise their own error below
                self._take(func(*args, **{**plan, "device": "meta"}))
        return func(*args, **kwargs)

    def _take(self, planned: Tensor) -> None:
        self.bytes_left -= math.prod(planned.shape) * planned.element_size()
        self.tensors_left -= 1
        if min(self.bytes_left, self.tensors_left) < 0:
            raise UserError(
                f"{self.folder}/run.json: its fields ask for networks far larger than its checkpoint, which has "
                f"{self.saved_bytes:,} bytes; restore it from a copy"
            )
