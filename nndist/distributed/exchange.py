"""Sends tensors and plain values from each process to another one, all at once in a ring."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .runtime import Runtime


def exchanged(runtime: Runtime, value: Any, tensors: Sequence[Tensor], distance: int) -> tuple[Any, list[Tensor]]:
    """The (JSON-like) value and the tensors of process `rank + distance`; a collective.

    The tensors are copies with the same strides, on this process's device or, where they were there, on the CPU.
    """
    if runtime.world_size == 1 or distance % runtime.world_size == 0:
        return value, [laid_out(tensor.detach().clone(), tensor.stride()) for tensor in tensors]
    heads = [
        [str(t.dtype).removeprefix("torch."), list(t.shape), list(t.stride()), t.device.type == "cpu"] for t in tensors
    ]
    text = torch.frombuffer(bytearray(json.dumps([value, heads]).encode()), dtype=torch.uint8).to(runtime.device)
    sizes = runtime.gather_objects([len(text), sum(t.numel() * t.element_size() for t in tensors)])
    source = (runtime.rank + distance) % runtime.world_size
    received = ring(runtime, text, text.new_empty(sizes[source][0]), distance)
    value, heads = json.loads(bytes(received.cpu().tolist()))
    parts = [t.detach().contiguous().view(-1).view(torch.uint8).to(runtime.device) for t in tensors]
    own = torch.cat([*parts, text[:0]])
    rest = ring(runtime, own, own.new_empty(sizes[source][1]), distance)
    found = []
    for name, shape, stride, on_cpu in heads:
        dtype = getattr(torch, name)
        size = math.prod(shape) * dtype.itemsize
        part, rest = rest[:size], rest[size:]
        whole = part.clone().view(dtype).reshape(shape)  # a copy begins where memory is aligned, as kernels like it
        found.append(laid_out(whole.cpu() if on_cpu else whole, stride))
    return value, found


def laid_out(tensor: Tensor, stride: Sequence[int]) -> Tensor:
    """The tensor with these strides, if they leave no gap and let no elements share memory."""
    if tuple(stride) == tensor.stride():
        return tensor
    other = torch.empty_strided(tensor.shape, tuple(stride), dtype=tensor.dtype, device=tensor.device)
    dense = torch.empty_like(other, memory_format=torch.preserve_format).stride() == other.stride()
    return other.copy_(tensor) if dense and tensor.numel() and 0 not in stride else tensor


def ring(runtime: Runtime, own: Tensor, room: Tensor, distance: int) -> Tensor:
    """Sends `own` to process `rank - distance` while `room` is filled by process `rank + distance`; returns it."""
    size = runtime.world_size
    target, source = (runtime.rank - distance) % size, (runtime.rank + distance) % size
    if target == runtime.rank:
        return room.copy_(own)
    operations = [dist.P2POp(dist.isend, own.contiguous(), target)] if own.numel() else []
    operations += [dist.P2POp(dist.irecv, room, source)] if room.numel() else []
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return room
