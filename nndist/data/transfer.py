"""Batches on their way from the host's memory to the device, copied while the step before is computed.

On a CUDA GPU a side stream copies batch i + 1 while the training's own stream computes step i. Before each copy the
side stream waits for the work that is queued by then, steps up to i - 1, and so for every reader of the memory that the
copy may be given; hence a batch needs no `record_stream`, and at most one more batch lies on the device than without.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch

from .batches import Batch, moved


class NoStream:
    """Copies in the order of all other work: on a CPU, and for data that this process reads itself.

    ahead: batches that are copied before they are asked for.
    """

    ahead = 0

    def __init__(self, device: torch.device, *, pinned: bool = False):
        self.device, self.pinned = device, pinned

    def begin(self, batch: Batch) -> Any:
        """Begins to copy a batch; what `arrived` needs."""
        return moved(batch, self.device, non_blocking=self.pinned)

    def arrived(self, begun: Any) -> Batch:
        """The batch, on the device for all work that is queued from now on."""
        return begun


class SideStream(NoStream):
    """Copies pinned batches on a CUDA stream of their own."""

    ahead = 1

    def __init__(self, device: torch.device):
        super().__init__(device, pinned=True)
        self.stream = stream_of(device, "copies")

    def begin(self, batch: Batch) -> Any:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            there = super().begin(batch)
            return there, self.stream.record_event()

    def arrived(self, begun: Any) -> Batch:
        there, copied = begun
        torch.cuda.current_stream(self.device).wait_event(copied)
        return there


@cache
def stream_of(device: torch.device, purpose: str) -> Any:
    """A CUDA stream for a purpose: always the same one, since freed memory is reused within a stream only."""
    return torch.cuda.Stream(device)


def copier(device: torch.device, num_workers: int) -> NoStream:
    """What copies batches to a device. num_workers: the processes that read them."""
    if device.type != "cuda":
        return NoStream(device)
    # What this process reads itself is not read ahead: the dataset's own state would be ahead of the training's.
    return SideStream(device) if num_workers else NoStream(device, pinned=True)


def delivered(read: Iterable[Batch], copier: NoStream) -> Iterator[Batch]:
    """The batches on the device, in their order; an error of `read` is raised in place of its batch."""
    source = iter(read)
    begun: deque[Any] = deque()
    error: list[Exception] = []
    is_over = False
    while True:
        while not is_over and len(begun) <= copier.ahead:
            try:
                begun.append(copier.begin(next(source)))
            except StopIteration:
                is_over = True
            except Exception as raised:
                error, is_over = [raised], True
        if not begun:
            break
        yield copier.arrived(begun.popleft())  # without a name, which would keep it in memory
    if error:
        raise error.pop()
