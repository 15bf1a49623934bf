"""Networks that outgrow a device: parameters, gradients and optimizer sharded over the processes (torch's FSDP2).

Each process holds a shard of every tensor: the rows of its rank. A block's full weights exist only in its forward and
backward passes, then its gradients are reduced and sharded. This uses torch's `fully_shard`, on CPUs and GPUs, not
Accelerate's plugin, which on a CPU silently becomes DDP.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import machine
from ..distributed.aside import Aside, gathered_rows
from ..distributed.blocks import local, repeated_blocks, sharded_as
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..runs import checkpoint, checkpoint_writer
from . import sharded_saving
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
        self.aside = Aside(runtime.timeout_seconds)
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
        gathered = self.runtime.weight_compression == "bf16" and is_fp32(network)
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if gathered else None,
            reduce_dtype=torch.bfloat16 if compressed else torch.float32 if gathered else None,
            cast_forward_inputs=False,  # which would round inputs that the network is about to scale; autocast casts
        )
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
        found = gathered_rows(local(tensor).contiguous(), tensor.shape[0], rank)
        return None if found is None else found.cpu()

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
        """Copies this process's shards to the CPU; all processes then write the checkpoint in the background.

        The main process calls `then` once the checkpoint is published.
        """
        parts = {
            file: {name: sharded_saving.copied_part(tensor) for name, tensor in tensors.items()}
            for file, tensors in taken.tensors.items()
        }
        whole = {file: checkpoint.plain(of) for file, of in taken.whole.items()} if self.runtime.is_main else {}
        rest = checkpoint.Checkpoint(taken.step, whole, taken.state)

        def write() -> None:
            sharded_saving.publish(self.aside, root, parts, rest)
            if self.aside.is_main:
                then()

        writer.submit(write)


def sharding_called(name: str, runtime: Runtime) -> Replicated:
    """The sharding of that name: "none" or "fsdp", which has nothing to shard on one process."""
    if name == "none":
        return Replicated(runtime)
    if runtime.world_size == 1:
        return Replicated(runtime, "fsdp, 1 process: nothing to shard")
    return FullyShard(runtime)


def part_of(whole: Tensor, like: Any) -> Tensor:
    """This process's shard of a tensor, as a DTensor sharded as `like` is."""
    if not hasattr(like, "to_local"):
        return whole
    rows = -(-whole.shape[0] // like.device_mesh.size())
    start = rows * like.device_mesh.get_local_rank()
    part = whole[start : start + rows].clone().to(like.device)  # a view would keep the full tensor in memory
    return sharded_as(like, part)


def is_fp32(network: nn.Module) -> bool:
    """Whether all parameters are in fp32."""
    return all(parameter.dtype == torch.float32 for parameter in network.parameters())


def tied(network: nn.Module) -> list[list[str]]:
    """The names of parameters that are one and the same tensor."""
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [found for found in names.values() if len(found) > 1]
