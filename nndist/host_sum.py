"""Sums over the processes of one machine, through memory that they share."""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import select
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UserError

MOST_PROCESSES = 8  # each reads what all have written, so that the work grows with the square of their number
LINE = 64  # bytes of a cache line: flags of two processes that share one would slow each other down
SPIN_SECONDS = 0.002


class HostSum:
    """Adds up tensors of all processes, the same bits on each: their order is that of the ranks.

    gloo sends through sockets even where no network is between: of 0.9 MB it takes 3 ms for two processes, this 0.4
    (2 cores, 2026-11-21). Each process copies its tensor to its place, raises its flag, waits for those of the others,
    and adds up all places. There are two sets of places by turns: who raises the flag of one turn has read those of the
    turn before, so that nobody writes what another still reads.

    Every method that is not private is a collective. Only where processors show their writes in order (x86-64).
    gather: gives the (JSON-like) values of all processes.
    """

    def __init__(self, rank: int, world_size: int, gather: Callable[[Any], list[Any]], timeout_seconds: float):
        self.rank, self.world_size, self.gather, self.timeout_seconds = rank, world_size, gather, timeout_seconds
        self.room = 0  # bytes of a place
        self.turn = 0
        self.others: dict[int, int] = {}  # rank -> a file that can be read from once that process has ended
        self.usable = self._agree(self._find_others())

    def sum(self, tensor: Tensor) -> bool:
        """Makes a tensor the sum over all processes, in place; False where that can't be done here, and nothing was.

        Its shape and type must be the same on all. Raises RuntimeError where another process has ended or does not come
        within the time-out, UserError where another one has another number of bytes.
        """
        if not self.usable or not tensor.is_contiguous():
            return False
        if tensor.nbytes > self.room:
            self.usable = self._agree(self._map(max(2 * self.room, tensor.nbytes)))
            if not self.usable:
                return False
        self.turn += 1
        places = [self._place(rank, tensor) for rank in range(self.world_size)]
        places[self.rank].copy_(tensor)
        mine, size = self.rank * LINE // 8, 1 + self.turn % 2
        self._flags[mine + size] = tensor.nbytes
        self._flags[mine] = self.turn
        for rank in range(self.world_size):
            self._wait(rank)
            if (theirs := self._flags[rank * LINE // 8 + size]) != tensor.nbytes:
                raise UserError(
                    f"process {rank} adds {theirs} bytes to a sum where process {self.rank} adds {tensor.nbytes}; in "
                    "each step all processes must use the same parameters of a network"
                )
        torch.add(places[0], places[1], out=tensor)
        for place in places[2:]:
            tensor.add_(place)
        return True

    def _agree(self, done: bool) -> bool:
        """Whether all processes have done it."""
        return all(self.gather(done))

    def _find_others(self) -> bool:
        """Opens what tells of the others' end; False where they are not all on this machine, within sight."""
        known = platform.system() == "Linux" and platform.machine() == "x86_64" and self.world_size <= MOST_PROCESSES
        seen = [str(Path(f"/proc/self/ns/{space}").stat().st_ino) for space in ("pid", "mnt")] if known else []
        boot = Path("/proc/sys/kernel/random/boot_id").read_text() if known else ""
        everyone = self.gather([os.getpid(), boot, *seen])
        if not known or any(there[1:] != everyone[0][1:] for there in everyone):
            return False
        try:
            self.others = {rank: os.pidfd_open(there[0]) for rank, there in enumerate(everyone) if rank != self.rank}
        except OSError:  # a kernel before 5.3
            return False
        return True

    def _map(self, room: int) -> bool:
        """Shares memory with places of that many bytes; False where there is none. What was there is given up."""
        room = -(-room // LINE) * LINE
        size = self.world_size * LINE + 2 * self.world_size * room
        path = self.gather(_shared_file(size) if self.rank == 0 else "")[0]
        mapped = None
        with contextlib.suppress(OSError, ValueError):
            descriptor = os.open(path, os.O_RDWR)
            try:
                mapped = mmap.mmap(descriptor, size)
            finally:
                os.close(descriptor)
        self.gather(None)  # all have opened it
        if self.rank == 0 and path:
            Path(path).unlink()  # it lives as long as they do
        if mapped is None:
            return False
        self._flags = memoryview(mapped).cast("q")
        self._bytes = torch.frombuffer(mapped, dtype=torch.uint8)
        self.room, self.turn = room, 0
        return True

    def _place(self, rank: int, like: Tensor) -> Tensor:
        start = self.world_size * LINE + (self.turn % 2 * self.world_size + rank) * self.room
        return self._bytes[start : start + like.nbytes].view(like.dtype).view(like.shape)

    def _wait(self, rank: int) -> None:
        """Until that process has raised its flag."""
        flag = rank * LINE // 8
        if self._flags[flag] >= self.turn:
            return
        began = time.monotonic()
        while self._flags[flag] < self.turn:
            waited = time.monotonic() - began
            if waited < SPIN_SECONDS:
                os.sched_yield()
                continue
            time.sleep(min(0.001, waited / 20))
            if waited > 0.05 and select.select([self.others[rank]], [], [], 0)[0] and self._flags[flag] < self.turn:
                raise RuntimeError(f"Connection closed by peer (process {rank} has ended)")
            if waited > self.timeout_seconds:
                raise RuntimeError(f"Timed out after {self.timeout_seconds:g} s: process {rank} did not come")


def _shared_file(size: int) -> str:
    """The path of a new file in memory; empty where there is no room for it."""
    path = ""
    try:
        descriptor, path = tempfile.mkstemp(prefix="nndist-", dir="/dev/shm")
        try:
            os.posix_fallocate(descriptor, 0, size)  # without room, a write to it would kill the process
        finally:
            os.close(descriptor)
    except OSError:
        if path:
            Path(path).unlink()
        return ""
    return path
