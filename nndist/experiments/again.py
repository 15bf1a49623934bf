"""A run trained again from a checkpoint: the weights after each step, or a step's operations with their results."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..data.feed import GlobalBatch
from ..distributed.blocks import local
from ..distributed.runtime import Runtime
from ..training.step import Losses
from ..training.trainer import Trainer
from .examine import module_names, place_of
from .replay import Replay


@dataclass
class Trace:
    """A step: its examples, a hash of its inputs, and its operations in order.

    operations: (name, module, line, hash of the result).
    """

    examples: list[int] = field(default_factory=list)
    inputs: str = ""
    operations: list[tuple[str, str, str, str]] = field(default_factory=list)


class Tracing(TorchDispatchMode):
    """Notes each operation with a hash of its result."""

    def __init__(self, trace: Trace):
        super().__init__()
        self.trace, self.module = trace, ""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        name = str(function).removeprefix("aten.").split(".")[0]
        tensors = [t for t in (result if isinstance(result, tuple | list) else (result,)) if isinstance(t, Tensor)]
        if tensors and "empty" not in name:  # whose contents are whatever the memory held
            module, line = place_of(self.module)
            self.trace.operations.append((name, module, line, "".join(map(_hash, tensors))))
        return result


def _hash(tensor: Tensor) -> str:
    """A hash of a tensor's bits."""
    plain = local(tensor.detach())
    if plain.is_meta:
        return "meta"
    data: Any = plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


@dataclass
class Again:
    """A run as it was trained again. hashes: of the weights by step. wrong: what in the run training did not reproduce.

    trace: of the step that was observed. notes: what may make bits differ. wrong is the same on all processes.
    """

    notes: list[str]
    hashes: dict[int, str] = field(default_factory=dict)
    trace: Trace = field(default_factory=Trace)
    wrong: str = ""
    replay: Replay | None = None

    @property
    def runtime(self) -> Runtime:
        assert self.replay is not None, "a run that was trained again here"
        return self.replay.trainer.runtime

    def as_json(self) -> dict[str, Any]:
        """For a process of another environment."""
        return {"notes": self.notes, "hashes": self.hashes, "trace": vars(self.trace), "wrong": self.wrong}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Again:
        trace = Trace(**found["trace"])
        trace.operations = [(name, module, line, bits) for name, module, line, bits in trace.operations]
        return cls(found["notes"], {int(step): bits for step, bits in found["hashes"].items()}, trace, found["wrong"])


def trained_again(folder: Path, start: int, last: int, trust: bool) -> Again:
    """A run from its checkpoint of step `start` to step `last`, or its end; a collective."""
    replay = Replay(folder, start + 1, trust=trust)
    hashes = weights_by_step(replay, min(last, replay.trainer.total_steps))
    return Again(replay.notes, hashes, wrong=not_kept(replay), replay=replay)


def observed(folder: Path, step: int, trust: bool) -> Again:
    """A run up to a step, with a trace of that step on this process; a collective."""
    replay, trace = Replay(folder, step, trust=trust), Trace()

    def observe(trainer: Trainer, batch: GlobalBatch, due: Any) -> Losses:
        real = trainer.optimizer_step._step  # type: ignore[attr-defined]
        numbers = torch.cat([micro.numbers[: micro.size].cpu() for micro in batch.micro_batches])
        trace.examples = trainer.feed.examples.named(numbers).tolist()
        digest = hashlib.blake2b(digest_size=8)
        for micro in batch.micro_batches:
            for part in _tensors(micro.raw):
                digest.update(_hash(part).encode())
        trace.inputs = digest.hexdigest()
        tracing = Tracing(trace)
        with module_names(trainer.networks, tracing), tracing:
            return real(batch, due)

    replay.advance(step, observe)
    return Again(replay.notes, trace=trace, wrong=not_kept(replay), replay=replay)


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in a batch, in order."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for one in value for t in _tensors(one)] if isinstance(value, tuple | list) else []


def weights_by_step(replay: Replay, last: int) -> dict[int, str]:
    """Hashes of the weights by step, from where a replay stands up to `last`."""
    hashes: dict[int, str] = {}
    trainer = replay.trainer

    def note() -> None:
        digest = hashlib.blake2b(digest_size=8)
        for name, network in sorted(trainer.networks.items()):
            for key, parameter in network.named_parameters():
                digest.update(f"{name}.{key}{_hash(parameter)}".encode())
        hashes[trainer.step] = digest.hexdigest()

    replay.advance(last, each=note)
    note()
    return hashes


def not_kept(replay: Replay) -> str:
    """What in a run training did not reproduce; "" if it reproduced everything. A collective."""
    _, record = replay.records_differ()
    checkpoint_of = replay.checkpoint_differs(replay.trainer.step)
    wrong = record or (f"checkpoint of step {replay.trainer.step:,}, {checkpoint_of}" if checkpoint_of else "")
    return replay.trainer.runtime.from_main(wrong)
