"""Checkpoints of sharded networks: all processes copy their shards to the host, then write while training continues."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributed.aside import Aside, gathered_rows
from ..distributed.blocks import local
from ..runs import checkpoint, checkpoint_writer
from .sharing import sees


class Part(NamedTuple):
    """This process's share of a tensor, copied to the CPU. like: shape and dtype of the full tensor, without memory."""

    held: Tensor
    like: Tensor
    is_sharded: bool


def copied_part(tensor: Tensor) -> Part:
    """The share of a tensor that this process holds; training may change the tensor afterwards."""
    held = local(tensor).to("cpu", copy=True, memory_format=torch.contiguous_format)
    like = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return Part(held, like, hasattr(tensor, "to_local"))


Parts = Mapping[str, Part]


def publish(aside: Aside, root: Path, parts: Mapping[str, Parts], rest: checkpoint.Checkpoint) -> None:
    """Writes a checkpoint, each process some of the tensors; raises OSError on all processes if one can't.

    Each tensor in turn is gathered in full on the process that writes it, so that of full tensors a process holds one
    at a time. rest: what the main process writes besides.
    """
    temporary = root / f".{checkpoint.folder_name(rest.step)}.part"
    _on_main(aside, lambda: checkpoint_writer.begin(root, rest.step))
    try:
        files: dict[str, Any] = {}
        ranks = sees(aside, temporary)  # not those of machines that do not share the main process's disk
        for name, of_file in parts.items():
            files |= _write(aside, temporary, name, of_file, ranks)

        def finish() -> None:
            from safetensors.torch import save

            for name, tensors in rest.tensors.items():
                files[name] = checkpoint_writer.write_file(temporary / name, save(tensors))
            checkpoint_writer.finish(temporary, rest.step, files, rest.state)

        _on_main(aside, finish)
    except OSError:
        if aside.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write(aside: Aside, folder: Path, name: str, parts: Parts, ranks: Sequence[int]) -> dict[str, Any]:
    """Writes a file as one part for each of the ranks; returns their and the index's manifest entries, on all."""
    like = {key: part.like for key, part in parts.items()}
    shares = shared_out({key: t.numel() * t.element_size() for key, t in like.items()}, len(ranks))
    owners = {key: ranks[share] for key, share in shares.items()}
    writers = sorted(set(owners.values())) or [0]
    names = {rank: checkpoint_writer.part_name(name, n, len(writers)) for n, rank in enumerate(writers, 1)}
    own = {key: like[key] for key, rank in sorted(owners.items()) if rank == aside.rank}
    file: checkpoint_writer.TensorFile | None = None
    entries: dict[str, Any] = {}
    reason = ""

    def attempt(action: Callable[[], None]) -> None:
        nonlocal reason
        try:
            if not reason:
                action()
        except OSError as error:  # this process must keep joining the collectives, or the others would hang
            reason = error.strerror or str(error)

    def begin() -> None:
        nonlocal file
        file = checkpoint_writer.TensorFile(folder / names[aside.rank], own)

    def end() -> None:
        assert file is not None
        entries[names[aside.rank]] = file.close()

    if aside.rank in names:
        attempt(begin)
    for key, owner in sorted(owners.items()):
        found = _gathered(aside, parts[key], owner)
        if found is not None:
            attempt(lambda found=found: file.add(found))  # type: ignore[misc, union-attr]
    if aside.rank in names:
        attempt(end)
    if aside.is_main and len(writers) > 1:
        places = {key: names[rank] for key, rank in owners.items()}
        index = name + checkpoint.INDEX
        attempt(
            lambda: entries.update(
                {index: checkpoint_writer.write_file(folder / index, checkpoint_writer.index_file(like, places))}
            )
        )
    if file is not None and reason:
        file.abandon()
    outcomes = aside.gather_objects([entries, reason])
    for rank, (_, why) in enumerate(outcomes):
        if why:
            raise OSError(None, f"process {rank}: {why}")
    return {key: value for found, _ in outcomes for key, value in found.items()}


def _gathered(aside: Aside, part: Part, rank: int) -> Tensor | None:
    """The full tensor on process `rank`; None on the others. A collective."""
    if part.is_sharded:
        return gathered_rows(part.held, part.like.shape[0], rank, aside.group)
    return part.held if rank == aside.rank else None


def _on_main(aside: Aside, action: Callable[[], object]) -> None:
    """Runs `action` on the main process; raises its OSError on all."""
    reason = ""
    if aside.is_main:
        try:
            action()
        except OSError as error:
            reason = error.strerror or str(error)
    reason = aside.from_main(reason)
    if reason:
        raise OSError(None, reason)


def shared_out(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Name -> one of `count` processes, balanced: the largest first, each to the least loaded."""
    loads = [0] * count
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner = loads.index(min(loads))
        owners[name] = owner
        loads[owner] += sizes[name]
    return owners
