"""What one of several processes does that add tensors up in shared memory, without gloo."""

import itertools
import json
import os
import signal
import time
from pathlib import Path

import torch

import nndist.distributed.shared_memory
from nndist.distributed.shared_memory import HostSum
from nndist.errors import UserError

CALLS = itertools.count()
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64)


def gatherer(folder: Path, rank: int, world_size: int):
    def gather(value):
        call = next(CALLS)
        (folder / f".{call}-{rank}").write_text(json.dumps(value))
        (folder / f".{call}-{rank}").rename(folder / f"{call}-{rank}")
        paths = [folder / f"{call}-{other}" for other in range(world_size)]
        while not all(path.exists() for path in paths):
            time.sleep(0.001)
        return [json.loads(path.read_text()) for path in paths]

    return gather


def tensor_of(rank: int, size: int, dtype: torch.dtype, number: int = 0) -> torch.Tensor:
    """What a process adds: the same whoever makes it."""
    generator = torch.Generator().manual_seed(1000 * number + rank)
    return (100 * torch.rand(size, generator=generator)).to(dtype)


def main(folder: Path, rank: int, world_size: int, what: str) -> None:
    torch.set_num_threads(1)
    nndist.distributed.shared_memory.LEAST_ROOM = 0  # small sums grow it, too
    if what == "no room" and rank == 0:
        nndist.distributed.shared_memory._shared_file = lambda size: ""
    if what == "no room for one" and rank == 1:

        def refuse(*given):
            raise OSError("no room")

        nndist.distributed.shared_memory.mmap.mmap = refuse
    if what == "another machine" and rank == 1:
        reads = Path.read_text
        Path.read_text = lambda path, *given: "other" if path.name == "boot_id" else reads(path, *given)
    timeout = 3.0 if what == "stopped" else 60.0
    sums = HostSum(rank, world_size, gatherer(folder, rank, world_size), timeout)
    if what == "sums":
        for size in (1, 7, 1000, 64, 300_001):  # grows twice
            for dtype in TYPES:
                found = tensor_of(rank, size, dtype)
                assert sums.sum(found)
                expected = tensor_of(0, size, dtype)
                for other in range(1, world_size):
                    expected += tensor_of(other, size, dtype)
                assert torch.equal(found, expected), (size, dtype)
        for number in range(100):  # nobody overtakes: places are rewritten in each turn
            time.sleep(0.003 * (number % 25 == 5 * rank))
            found = tensor_of(rank, 5000, torch.float32, number)
            assert sums.sum(found)
            rest = [tensor_of(other, 5000, torch.float32, number) for other in range(world_size)]
            assert torch.equal(found, sum(rest[1:], rest[0].clone())), number
        scalar = torch.tensor(2.0)
        assert sums.sum(scalar) and scalar == 2 * world_size
        assert not sums.sum(torch.zeros(4, 4)[:, 1]), "not contiguous: by other means"
    elif what.startswith("sizes"):  # within the room that there is, beyond it, and before there is any
        if what != "sizes at first":
            assert sums.sum(torch.ones(100))
        own = {"sizes": 90 + rank, "sizes grow": 100 + 1000 * (rank == 1), "sizes at first": 10 + rank}[what]
        try:
            sums.sum(torch.ones(own))
        except UserError as error:
            assert f"adds {4 * own}; in each step" in str(error) and "must use the same parameters" in str(error)
        else:
            raise AssertionError("not said")
    elif what == "too large":
        assert sums.sum(torch.ones(10))
        nndist.distributed.shared_memory._shared_file = lambda size: ""
        large, small = torch.ones(1000), torch.full((10,), 1.0 + rank)
        assert not sums.sum(large) and torch.equal(large, torch.ones(1000))
        assert sums.sum(small) and torch.equal(small, torch.full((10,), world_size * (world_size + 1) / 2))
        assert not sums.sum(large) and sums.sum(torch.zeros(0))
    elif what in ("no room", "no room for one", "another machine"):
        found = torch.ones(10)
        assert not sums.sum(found) and torch.equal(found, torch.ones(10)) and not (sums.usable and sums.room)
    else:
        assert sums.sum(torch.ones(10))
        if rank == 1:
            (folder / "pid").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP if what == "stopped" else signal.SIGKILL)
        sums.sum(torch.ones(1000 if "grows" in what else 10))
