"""Collectives of plain values and rows, and a second process group for a thread that works while training continues."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def gathered_objects(value: Any, world_size: int, device: torch.device, group: Any = None) -> list[Any]:
    """The (small, JSON-like) values of all processes of a group, by rank; torch's own collectives use pickle."""
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size)]
    dist.all_gather(sizes, torch.tensor([len(text)], device=device), group=group)
    longest = int(max(sizes))
    texts = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in range(world_size)]
    dist.all_gather(texts, nn.functional.pad(text, (0, longest - len(text))), group=group)
    return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, sizes, strict=True)]


def gathered_rows(part: Tensor, count: int, rank: int, group: Any = None) -> Tensor | None:
    """The `count` rows of a tensor sharded by rows, on process `rank`, in order; None on the others. A collective."""
    world_size = dist.get_world_size(group)
    rows = -(-count // world_size)
    if len(part) < rows:  # the last processes have fewer or none
        part = torch.cat([part, part.new_zeros(rows - len(part), *part.shape[1:])])
    if dist.get_rank(group) != rank:
        dist.gather(part, dst=rank, group=group)
        return None
    room = part.new_empty(rows * world_size, *part.shape[1:])
    dist.gather(part, list(room.split(rows)), dst=rank, group=group)
    return room[:count]


def scattered_rows(whole: Tensor | None, like: Tensor, count: int, rank: int) -> Tensor:
    """This process's rows, shaped as `like`, of the tensor of `count` rows on process `rank`. A collective."""
    world_size = dist.get_world_size()
    rows = -(-count // world_size)
    part = like.new_empty(rows, *like.shape[1:])
    if whole is None:
        dist.scatter(part, src=rank)
    else:
        room = torch.cat([whole, whole.new_zeros(rows * world_size - count, *whole.shape[1:])])
        dist.scatter(part, list(room.split(rows)), src=rank)
    return part[: len(like)]


class Aside:
    """A second group of a run's processes, for a thread's collectives on the CPU while training continues.

    It has connections of its own (gloo): over training's, the two would receive each other's messages.
    """

    def __init__(self, timeout_seconds: float):
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.is_main = self.rank == 0

    def gather_objects(self, value: Any) -> list[Any]:
        """The (small, JSON-like) values of all processes, by rank."""
        return gathered_objects(value, self.world_size, torch.device("cpu"), self.group)

    def from_main(self, value: Any) -> Any:
        """The main process's (small, JSON-like) value."""
        return self.gather_objects(value if self.is_main else None)[0]
