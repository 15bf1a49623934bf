"""Checkpoints on machines that share no disk: the main process has them, and sends the others what they must read."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..distributed.aside import Aside
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..files import read_bytes
from ..runs import checkpoint

if TYPE_CHECKING:
    from .sharding import Replicated

BLOCK_BYTES = 64 << 20
COPIES = ".from-main"
"""In the folder of checkpoints: what a machine without the main process's disk reads once."""


def read(
    runtime: Runtime, sharding: Replicated, path: Path, networks: Mapping[str, nn.Module]
) -> checkpoint.Checkpoint:
    """Reads the main process's checkpoint at `path` on all processes, sharded as the networks are. A collective.

    One process of each machine that does not have the same file there gets a copy, which is removed after it was read.
    Raises DamagedCheckpoint on the processes that find it damaged, and UserError on all if a copy can't be written.
    """
    identities = runtime.gather_objects(_identity(path)) if runtime.world_size > 1 else [""]
    if len(set(identities)) == 1:
        return sharding.read(path, networks)
    has_it = identities[runtime.rank] == identities[0]
    copy = path.parent / COPIES / path.name
    _copy(runtime, path, None if has_it or not runtime.is_local_main else copy)
    try:
        return sharding.read(path if has_it else copy, networks)
    except checkpoint.DamagedCheckpoint as error:
        damage = error
    finally:
        runtime.barrier()
        if runtime.is_local_main and not has_it:
            shutil.rmtree(copy.parent, ignore_errors=True)
    raise damage


def sees(processes: Aside, folder: Path) -> list[int]:
    """The ranks of the processes that see a folder of the main process. A collective."""
    return [rank for rank, found in enumerate(processes.gather_objects(folder.is_dir())) if found]


def _identity(path: Path) -> str:
    try:
        return hashlib.sha256(read_bytes(path / checkpoint.MANIFEST)).hexdigest()
    except OSError:
        return ""


def _copy(runtime: Runtime, path: Path, to: Path | None) -> None:
    """Broadcasts the files of the main process's folder; writes them into `to` unless it is None. A collective."""
    names: list[str] = []
    if runtime.is_main:
        names = sorted(file.name for file in path.iterdir() if file.is_file())
    problem = ""
    with contextlib.ExitStack() as stack:
        for name in runtime.from_main(names):
            source = stack.enter_context((path / name).open("rb")) if runtime.is_main else None
            size = runtime.from_main(os.fstat(source.fileno()).st_size if source else 0)
            target = None
            try:
                if to is not None and not problem:
                    to.mkdir(parents=True, exist_ok=True)
                    target = stack.enter_context((to / name).open("wb"))
            except OSError as error:  # this process must keep joining the broadcasts, or the others would hang
                problem = f"{to}: {error.strerror}"
            for start in range(0, size, BLOCK_BYTES):
                runtime.alive()
                block = torch.zeros(min(BLOCK_BYTES, size - start), dtype=torch.uint8)
                if source is not None:
                    read = source.readinto(block.numpy())  # what is missing stays zero, which its hash shows
                    assert read is not None
                block = block.to(runtime.device)
                runtime.broadcast(block)
                try:
                    if target is not None and not problem:
                        target.write(block.cpu().numpy().data)
                except OSError as error:
                    problem = f"{to}: {error.strerror}"
    problems = [text for text in runtime.gather_objects(problem) if text]
    if problems:
        raise UserError(f"{problems[0]}; make room there, or give another --runs-dir that every machine can write to")
