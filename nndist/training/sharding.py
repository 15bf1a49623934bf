"""Networks that outgrow a device: parameters, gradients and optimizer sharded over the processes (torch's FSDP2).

Each process holds a shard of every tensor: the rows of its rank. A block's full weights exist only in its forward and
backward passes, then its gradients are reduced and sharded. This uses torch's `fully_shard`, on CPUs and GPUs, not
Accelerate's plugin, which on a CPU silently becomes DDP.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import machine
from ..distributed.blocks import local, repeated_blocks
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..runs import checkpoint, checkpoint_writer
from .sharing import sees
from .snapshot import Snapshot

Networks = Mapping[str, nn.Module]


class Replicated:
    """Every process holds the full networks."""

    is_sharded = False

    def __init__(self, runtime: Runtime, note: str = ""):
        self.runtime = runtime
        self.note = note  # for the plan

    def place(self, network: nn.Module, *, channels_last: bool = False) -> nn.Module:
        """The network on the device, before its optimizer is made; its parameters may be different objects."""
        return self.runtime.place(network, channels_last=channels_last)

    def whole(self, networks: Networks, make: Callable[[], dict[str, nn.Module]]) -> Networks | None:
        """Full networks for what the main process does alone; None on the others. A collective."""
        return networks if self.runtime.is_main else None

    def read(self, path: Path, networks: Networks) -> checkpoint.Checkpoint:
        """A checkpoint, sharded as the networks are."""
        return checkpoint.read(path)

    def publish(self, root: Path, taken: Snapshot, writer: checkpoint_writer.Writer, then: Callable[[], None]) -> None:
        """Writes a checkpoint in the background on the main process, reads it back, and calls `then`."""
        copied = {file: checkpoint.plain(values) for file, values in (taken.tensors | taken.whole).items()}
        what = checkpoint.Checkpoint(taken.step, copied, taken.state)

        def write() -> None:
            path = checkpoint_writer.publish(root, what)
            try:
                checkpoint.read(path, checkpoint.nothing)
            except checkpoint.DamagedCheckpoint as damage:
                time.sleep(0.2)  # the folder may be being removed, which the end of the run notices
                if not (path / checkpoint.MANIFEST).exists():
                    return
                raise OSError(errno.EIO, f"read back damaged: {damage}") from damage
            then()  # only now that a newer one is safe

        writer.submit(write)


class FullyShard(Replicated):
    """Shards networks over the processes, one unit for each repeated block and one for the rest."""

    is_sharded = True

    def __init__(self, runtime: Runtime):
        super().__init__(runtime)
        if runtime.scaler is not None:
            raise UserError("--shard fsdp: does not support fp16's gradient scaler; use --precision bf16 or fp32")
        from torch.distributed.device_mesh import init_device_mesh

        if runtime.device.type == "cpu":
            machine.return_freed_memory()
        self.mesh = init_device_mesh(runtime.device.type, (runtime.world_size,))
        self.num_units = 0

    def place(self, network: nn.Module, *, channels_last: bool = False) -> nn.Module:
        """The network, sharded by rows; every process first makes it in full on its CPU, as the seed draws it.

        Raises UserError if it can't be sharded. Only `forward` may be called on a sharded network.
        """
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        network = self.runtime.place(network, whole=False)
        for tensor in (*network.parameters(), *network.buffers()):  # as DDP does: other machines may draw other weights
            held = tensor.detach().to(self.runtime.device)
            self.runtime.broadcast(held)
            tensor.detach().copy_(held)
        compressed = self.runtime.gradient_compression == "bf16"
        policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if compressed else None)
        ties = tied(network)
        units = [*repeated_blocks(network), network]
        try:
            for unit in units:
                # also the network's own unit: weights left gathered after an evaluation would be stale after a step
                fully_shard(unit, mesh=self.mesh, reshard_after_forward=True, mp_policy=policy)
        except (ValueError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--shard fsdp: {type(network).__name__} can't be sharded ({reason})") from error
        assert tied(network) == ties, "tied weights must stay tied"
        for module in network.modules():
            if isinstance(module, FSDPModule) and self.runtime.device.type == "cpu":
                module.set_force_sum_reduction_for_comms(True)  # gloo has no mean: sum, then divide
        self.num_units += len(units)
        self.note = f"fsdp ({self.num_units} units over {self.runtime.world_size} processes)"
        return network

    @torch.no_grad()
    def whole(self, networks: Networks, make: Callable[[], dict[str, nn.Module]]) -> Networks | None:
        """Full copies of the networks on the main process, whose device must have room for them; None on the others.

        `make` returns fresh networks. Tensors are gathered one by one.
        """
        copies = {name: self.runtime.place(copy) for name, copy in make().items()} if self.runtime.is_main else None
        for name, network in networks.items():
            targets = copies[name].state_dict() if copies else {}
            for key, tensor in network.state_dict().items():
                found = self.gather(tensor, 0)
                if found is not None:
                    targets[key].copy_(found)
        return copies

    def gather(self, tensor: Tensor, rank: int) -> Tensor | None:
        """The full tensor on the CPU of process `rank`; None on the others. A collective."""
        if not hasattr(tensor, "to_local"):
            return tensor.detach().cpu() if rank == self.runtime.rank else None
        rows = -(-tensor.shape[0] // self.runtime.world_size)
        part = local(tensor).contiguous()
        if len(part) < rows:  # the last processes have fewer or none
            part = torch.cat([part, part.new_zeros(rows - len(part), *part.shape[1:])])
        if self.runtime.rank != rank:
            dist.gather(part, dst=rank)
            return None
        room = part.new_empty(rows * self.runtime.world_size, *part.shape[1:])
        dist.gather(part, list(room.split(rows)), dst=rank)
        return room[: tensor.shape[0]].cpu()

    def read(self, path: Path, networks: Networks) -> checkpoint.Checkpoint:
        """A checkpoint with this process's shards, as DTensors; it may have been written unsharded."""
        states = {name: network.state_dict() for name, network in networks.items()}
        weights = checkpoint.network_tensors(states)
        parameters = {f"{name}/{key}": tensor for name, state in states.items() for key, tensor in state.items()}

        def keep(file: str, name: str, tensor: Tensor) -> Tensor:
            if file == "optimizer.safetensors":
                like = parameters.get(name.rpartition("/")[0])
            else:
                like = weights.get(name) if file in ("model.safetensors", "ema.safetensors") else None
            return tensor if like is None or like.shape != tensor.shape else part_of(tensor, like)

        return checkpoint.read(path, keep)

    def publish(self, root: Path, taken: Snapshot, writer: checkpoint_writer.Writer, then: Callable[[], None]) -> None:
        """Writes a checkpoint, each process some of the tensors; raises OSError on all processes if one can't.

        Each tensor in turn is gathered in full on the process that writes it: in the foreground, since gathering is a
        collective. The main process then calls `then`.
        """
        step = taken.step
        runtime = self.runtime
        temporary = root / f".{checkpoint.folder_name(step)}.part"
        self._on_main(lambda: checkpoint_writer.begin(root, step))
        try:
            files: dict[str, Any] = {}
            ranks = sees(runtime, temporary)  # not those of machines that do not share the main process's disk
            for name, of_file in taken.tensors.items():
                files |= self._write(temporary, name, of_file, ranks)

            def rest() -> None:
                from safetensors.torch import save

                for name, of_file in taken.whole.items():
                    files[name] = checkpoint_writer.write_file(temporary / name, save(checkpoint.plain(of_file)))
                checkpoint_writer.finish(temporary, step, files, taken.state)

            self._on_main(rest)
        except OSError:
            if runtime.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if runtime.is_main:
            then()

    def _write(self, folder: Path, name: str, tensors: Mapping[str, Tensor], ranks: Sequence[int]) -> dict[str, Any]:
        """Writes a file as one part for each of the ranks; returns their and the index's manifest entries, on all."""
        runtime = self.runtime
        shares = shared_out({key: t.numel() * t.element_size() for key, t in tensors.items()}, len(ranks))
        owners = {key: ranks[share] for key, share in shares.items()}
        writers = sorted(set(owners.values())) or [0]
        names = {rank: checkpoint_writer.part_name(name, n, len(writers)) for n, rank in enumerate(writers, 1)}
        own = {key: tensors[key] for key, rank in sorted(owners.items()) if rank == runtime.rank}
        file: checkpoint_writer.TensorFile | None = None
        said: dict[str, Any] = {}
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
            file = checkpoint_writer.TensorFile(folder / names[runtime.rank], own)

        def end() -> None:
            assert file is not None
            said[names[runtime.rank]] = file.close()

        if runtime.rank in names:
            attempt(begin)
        for key, owner in sorted(owners.items()):
            runtime.alive()
            found = self.gather(tensors[key], owner)
            if found is not None:
                attempt(lambda found=found: file.add(found))  # type: ignore[misc, union-attr]
        if runtime.rank in names:
            attempt(end)
        if runtime.is_main and len(writers) > 1:
            places = {key: names[rank] for key, rank in owners.items()}
            index = name + checkpoint.INDEX
            attempt(
                lambda: said.update(
                    {index: checkpoint_writer.write_file(folder / index, checkpoint_writer.index_file(tensors, places))}
                )
            )
        if file is not None and reason:
            file.abandon()
        outcomes = runtime.gather_objects([said, reason])
        for rank, (_, why) in enumerate(outcomes):
            if why:
                raise OSError(None, f"process {rank}: {why}")
        return {key: value for found, _ in outcomes for key, value in found.items()}

    def _on_main(self, action: Callable[[], object]) -> None:
        """Runs `action` on the main process; raises its OSError on all."""
        reason = ""
        if self.runtime.is_main:
            try:
                action()
            except OSError as error:
                reason = error.strerror or str(error)
        reason = self.runtime.from_main(reason)
        if reason:
            raise OSError(None, reason)


def sharding_called(name: str, runtime: Runtime) -> Replicated:
    """The sharding of that name: "none" or "fsdp", which has nothing to shard on one process."""
    if name == "none":
        return Replicated(runtime)
    if runtime.world_size == 1:
        return Replicated(runtime, "fsdp, 1 process: nothing to shard")
    return FullyShard(runtime)


def shared_out(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Name -> one of `count` processes, balanced: the largest first, each to the least loaded."""
    loads = [0] * count
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner = loads.index(min(loads))
        owners[name] = owner
        loads[owner] += sizes[name]
    return owners


def part_of(whole: Tensor, like: Any) -> Tensor:
    """This process's shard of a tensor, as a DTensor sharded as `like` is."""
    from torch.distributed.tensor import DTensor

    if not isinstance(like, DTensor):
        return whole
    rows = -(-whole.shape[0] // like.device_mesh.size())
    start = rows * like.device_mesh.get_local_rank()
    part = whole[start : start + rows].clone().to(like.device)  # a view would keep the full tensor in memory
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def tied(network: nn.Module) -> list[list[str]]:
    """The names of parameters that are one and the same tensor."""
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [found for found in names.values() if len(found) > 1]
