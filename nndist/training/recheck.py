"""`--recheck-every N`: detects machines that silently compute wrong results.

Every N steps the weights of all processes are compared, and each process's share of the step is computed twice: first
by another process, from the same examples, random numbers and objects, then by its own. Every result is compared in
bits: the outputs of modules, the losses, the gradients before their sum. The first pass leaves no trace, and the second
is the step itself, so training has the bits that it has without. A difference stops the run before the update.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn

from ..data.batches import Batch
from ..data.feed import GlobalBatch, MicroBatch
from ..distributed.batch_norm import Sums, is_global
from ..distributed.exchange import exchanged
from ..errors import TrainingError, UserError
from ..metrics import Weighted
from ..runs import optimizer_state
from ..runs.fingerprints import fingerprint, of_weights
from .shares import Borrowed, Packed, packed, remembered, share_of
from .traces import Event, Trace, first_difference

if TYPE_CHECKING:
    from .trainer import Trainer

Traces = list[list[Event]]
"""What was computed of each process's share, by its rank."""


def recheck_of(every: int | None, trainer: Trainer) -> NoRecheck:
    """What `--recheck-every` requests, or the null object; raises UserError where it is not supported."""
    return NoRecheck() if every is None else Recheck(every, trainer)


class NoRecheck:
    """Null object for a run without --recheck-every."""

    is_redoing = False

    def check(self) -> None:
        """Does nothing."""

    def before_step(self, step: int) -> None:
        """Does nothing."""

    def of(self, name: str, batch: GlobalBatch) -> contextlib.AbstractContextManager[None]:
        """Leaves the passes alone."""
        return contextlib.nullcontext()

    def add(self, losses: Tensor | Weighted) -> None:
        """Does nothing."""

    def compare(self) -> None:
        """Does nothing."""

    def note(self) -> str:
        """Nothing for the plan."""
        return ""


class Recheck(NoRecheck):
    """In every N-th step, compares the processes' weights and repeats each one's passes on another process."""

    def __init__(self, every: int, trainer: Trainer):
        self.every, self.trainer = every, trainer
        self.due = self.is_redoing = False
        self._step = 0
        self._inputs: dict[int, list[tuple[Batch, MicroBatch]]] = {}  # of the others' shares, by distance
        self._open = ""  # the objective whose passes are to be compared
        self._packed: Packed
        self._noting: Trace | None = None
        self._own, self._others = Trace(), Trace()
        runtime = trainer.runtime
        if trainer.sharding.is_sharded:
            raise UserError("--recheck-every: no process has a whole network with --shard fsdp; leave one of them out")
        if runtime.device.type != "cpu" and not runtime.deterministic:
            raise UserError(
                f"--recheck-every: on {runtime.device.type.upper()} a step repeats its bits only with --deterministic; "
                "give that too"
            )
        modules = (module for network in trainer.networks.values() for module in network.modules())
        if runtime.world_size > 1 and any(isinstance(m, nn.SyncBatchNorm) and not is_global(m) for m in modules):
            raise UserError(
                "--recheck-every: use BatchNorm, whose statistics are the global batch's, not SyncBatchNorm"
            )

    def note(self) -> str:
        """The line of the plan."""
        where = "in this process" if self.trainer.runtime.world_size == 1 else "on another process"
        return f"every {self.every:,} steps each share of the batch is computed twice, {where}"

    def check(self) -> None:
        """Raises UserError for Python objects that a second pass would change for good."""
        remembered(self.trainer)

    def before_step(self, step: int) -> None:
        """Decides whether step `step`, counted from 1, is checked; compares the weights if so. A collective.

        Raises TrainingError if the processes' weights differ.
        """
        self.due, self._step = step % self.every == 0, step
        self._inputs.clear()
        self._open = ""
        if self.due and self.trainer.runtime.world_size > 1:
            self._compare_weights()

    @contextlib.contextmanager
    def of(self, name: str, batch: GlobalBatch) -> Iterator[None]:
        """Context manager around a step's passes of one objective: first, processes compute each other's shares."""
        if not self.due:
            yield
            return
        trainer = self.trainer
        trainer.timing.enter("other")
        self._open = name
        self._packed = packed(trainer, batch)
        self._others = self._redo(name, distance=1, again=False)
        self._own = Trace()
        with self._noted(self._own):
            yield

    def add(self, losses: Tensor | Weighted) -> None:
        """Notes the losses of a micro-batch."""
        if self._noting is not None:
            self._noting.add_losses(losses)

    def compare(self) -> None:
        """Compares what was computed twice; a collective. Raises TrainingError if it differs."""
        if not self._open:
            return
        name, self._open = self._open, ""
        first = self._by_owner(self._others, distance=1)
        second = self._by_owner(self._own, distance=0)
        places = [first_difference(ours, theirs) for ours, theirs in zip(second, first, strict=True)]
        if any(place is not None for place in places):
            self._tell(name, second, first, places)

    @contextlib.contextmanager
    def _noted(self, trace: Trace) -> Iterator[None]:
        """Context manager: records what passes compute; not modules' outputs if compiled, as hooks recompile them."""
        modules_too = not self.trainer.optimizer_step.compiled.is_compiled
        self._noting = trace
        try:
            with trace.noting(self.trainer.networks, modules_too=modules_too):
                yield
        finally:
            self._noting = None

    def _redo(self, name: str, distance: int, *, again: bool) -> Trace:
        """Takes the passes of the process `distance` ranks further, and undoes all that they have changed."""
        trainer, step, trace = self.trainer, self.trainer.optimizer_step, Trace()
        share = share_of(trainer, self._packed, distance)
        with Borrowed(trainer, share, self._packed.python, again=again), self._as_owner(distance):
            if distance not in self._inputs:  # the first objective prepares the inputs for all
                self._inputs[distance] = [(step.inputs(share.batch, m), m) for m in share.batch.micro_batches]
            with self._noted(trace):
                for inputs, micro in self._inputs[distance]:
                    step._forward_backward(name, inputs, micro, share.batch.size)
        return trace

    @contextlib.contextmanager
    def _as_owner(self, distance: int) -> Iterator[None]:
        """Context manager: BatchNorm's terms go to the share's owner first, to be added in the same order."""
        runtime = self.trainer.runtime

        def to_owner(tensor: Tensor) -> Tensor:
            return exchanged(runtime, None, [tensor], -distance)[1][0]

        self.is_redoing = True
        Sums.to_owner = to_owner
        try:
            yield
        finally:
            self.is_redoing, Sums.to_owner = False, None

    def _by_owner(self, trace: Trace, distance: int) -> Traces:
        """All processes' traces, in order of the ranks whose shares they are."""
        found = self.trainer.runtime.gather_objects(trace.events())
        return [found[(rank - distance) % len(found)] for rank in range(len(found))]

    def _compare_weights(self) -> None:
        """Raises TrainingError, which names a process and a tensor, if weights or optimizer states differ."""
        runtime, hashes = self.trainer.runtime, hashes_of(self.trainer)
        mine = torch.stack([one.to(runtime.device) for one in hashes.values()])
        rows = [row.view(torch.int64).tolist() for row in runtime.gather_bytes(mine.view(torch.uint8))]
        for name, values in zip(hashes, zip(*rows, strict=True), strict=True):
            common = max(values, key=values.count)
            odd = [rank for rank, value in enumerate(values) if value != common]
            if 2 * len(odd) >= len(values):  # no majority
                self._stop([*range(len(values))], f"{name} has different bits on each, so one of them is wrong")
            if odd:
                self._stop(odd, f"{name} differs from its copies on the other processes")

    def _tell(self, name: str, own: Traces, other: Traces, places: list[int | None]) -> NoReturn:
        """Finds out who computed wrongly, if a third computation can tell, and raises TrainingError; a collective."""
        world = self.trainer.runtime.world_size
        first = min(place for place in places if place is not None)
        shares = [rank for rank, place in enumerate(places) if place == first]
        events = own[shares[0]] if first < len(own[shares[0]]) else other[shares[0]]
        what = events[first][0] if first < len(events) else "the number of operations"
        # a third computation: by a third process, by the owners again, or by this process again
        distance = 2 if world > 2 else 0
        third = self._by_owner(self._redo(name, distance, again=True), distance)
        self._inputs.clear()
        again = self._by_owner(self._redo(name, 1, again=True), 1) if world == 2 else other
        by_owner = {share: same_until(own[share], third[share], first) for share in shares}
        by_other = {share: same_until(other[share], third[share], first) for share in shares}
        if not any(by_owner.values()) and not any(by_other.values()) and (world == 1 or len(shares) == world):
            raise TrainingError(
                f"step {self._step}: {what} came out differently each time it was computed from the same numbers, "
                "so --recheck-every can't tell: an operation or the recipe is not deterministic (the time, the "
                "system's entropy); give --deterministic, or leave --recheck-every out"
            )
        suspects = [{share, (share - 1) % world} for share in shares]
        shared = sorted(set.intersection(*suspects))
        if world > 2 and len(shares) > 1 and len(shared) == 1:
            self._stop(shared, f"{what} came out wrong, both for its own share of the batch and for another's")
        if world > 2 and len(shares) == 1:
            (share,) = shares
            if by_owner[share] != by_other[share]:
                wrong = (share - 1) % world if by_owner[share] else share
                self._stop([wrong], f"{what} came out differently than on two other processes")
        if world == 2 and len(shares) == 1:
            (share,) = shares
            if not by_owner[share]:  # the owner's second attempt agrees with the other process
                self._stop([share], f"{what} came out differently on the other process, and in a second attempt")
            if not same_until(again[share], other[share], first):
                self._stop([1 - share], f"{what} came out differently on the other process, and in a second attempt")
        if world == 1:
            self._stop([0], f"{what} came out differently when it was computed again")
        ranks = sorted(set.union(*suspects))
        self._stop(ranks, f"{what} came out differently on each, so one of them is wrong")

    def _stop(self, ranks: list[int], what: str) -> NoReturn:
        hosts = self.trainer.hosts
        who = " and ".join(f"{rank} ({hosts[rank]})" for rank in ranks)
        raise TrainingError(
            f"step {self._step}: silent corruption on process{'es' * (len(ranks) > 1)} {who}: {what}; the step was not "
            "taken and the previous checkpoint is kept: replace the machine, and start the same command again"
        )


def same_until(ours: list[Event], theirs: list[Event], place: int) -> bool:
    """Whether two traces agree up to and including an event."""
    found = first_difference(ours, theirs)
    return found is None or found > place


def hashes_of(trainer: Trainer) -> dict[str, Tensor]:
    """A hash of every weight, and of every tensor of the optimizers' states, by name."""
    hashes = of_weights(trainer.networks)
    for name, optimizer in trainer.optimizers.items():
        tensors, _ = optimizer_state.optimizer_state({name: optimizer}, trainer.networks)
        hashes |= {f"optimizer state {key}": fingerprint(tensor) for key, tensor in tensors.items()}
    return hashes
