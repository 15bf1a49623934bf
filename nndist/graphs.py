"""Steps that are captured as CUDA graphs, several at a time, and replayed: next to no Python, and one launch.

What needs a GPU is in `CudaGraphs`; the rest is planning and holds for anything that records a function of tensors that
stay in their places and runs it again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from .data import ExampleRandom, GlobalBatch, MicroBatch, key_of
from .metrics import Weighted
from .optimizers import bare_step, make_replayable, obstacle_to_replay
from .recipe import Batch
from .replay import ReplayingStep
from .runtime import GlobalBatchNorm
from .step import EagerStep, Losses
from .tape import PythonState, relative_difference, same_bits


class Graphs(Protocol):
    """Records functions that read and change tensors in place."""

    def capture(self, function: Callable[[], None]) -> Callable[[], object]:
        """What repeats every operation of `function`; raises RuntimeError where it can't be recorded."""

    def watched(self) -> contextlib.AbstractContextManager[None]:
        """Within it an operation that can't be recorded raises RuntimeError."""


class CudaGraphs:
    """CUDA graphs on one stream, which is the current one from now on, so that nothing else has to wait for another."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        torch.cuda.set_stream(self.stream)
        self.pool = torch.cuda.graph_pool_handle()  # of all graphs: no two run at a time

    def capture(self, function: Callable[[], None]) -> Callable[[], object]:
        """See Graphs."""
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        gc.disable()  # a graph that is collected spoils the capture of another (github.com/pytorch/pytorch/pull/161037)
        try:
            # thread_local: a checkpoint may be on its way to the disk in another thread
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                function()
        finally:
            if collects:
                gc.enable()
        return graph.replay

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """What waits for the GPU raises RuntimeError."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


@dataclass
class _Captured:
    """Steps over batches of one shape, and the places of what goes in and comes out."""

    phases: list[Callable[[], object]]
    inputs: list[Tensor]  # the raw tensors and example numbers of the micro-batches
    factors: Tensor  # [steps], of the learning rates
    sent: Sequence[float]  # what stands there
    losses: Losses  # each [steps, k]
    norms: dict[str, Tensor]  # [steps]
    weights: Sequence[Tensor]  # of the losses: the phases read them, and nothing else may hold them any more


class GraphStep(ReplayingStep):
    """Replays optimizer steps, from the raw batch to the new weights, as recorded graphs of up to MOST steps.

    Steps that are taken together are a power of two, so that few graphs are recorded, each when it is first needed,
    after WARM_UP steps over batches of that shape, which are real ones. A graph is compared with the eager engine
    before it is used; a recipe whose steps can't be repeated is run eagerly, after one line that says why. Several
    processes take one step at a time: forward and backward are one graph, the update another, with one collective
    between them.

    Learning rates are tensors on the device, and the optimizers use the kernels that read them there.
    """

    name = "graph"
    MOST = 32
    WARM_UP = 3
    MOST_SHAPES = 16
    TOLERANCE = 1e-3  # where operations do not give the same bits each time; see relative_difference

    def __init__(self, *arguments: Any, graphs: Callable[[torch.device], Graphs] = CudaGraphs):
        super().__init__(*arguments)
        self.graphs = graphs(self.runtime.device)
        self._steps_of: dict[Any, int] = {}  # how many were taken over batches of a shape
        self._captured: dict[Any, _Captured] = {}
        self._factors: Sequence[float] = (1.0,)
        self._key = torch.zeros((), dtype=torch.int64, device=self.runtime.device)  # of the epoch's random numbers
        self._epoch = -1
        self._flat: dict[str, Tensor] = {}  # room for the gradients of a network, which the processes sum up
        self._lrs: list[tuple[Tensor, Tensor]] = []  # of each group of parameters: the present one, the recipe's
        modules = [module for network in self.networks.values() for module in network.modules()]
        if self.runtime.world_size > 1 and any(isinstance(module, GlobalBatchNorm) for module in modules):
            self._give_up("BatchNorm exchanges its statistics within a step")
        for name, optimizer in self.optimizers.items():
            if reason := obstacle_to_replay(optimizer):
                self._give_up(f"the optimizer of {name}, {type(optimizer).__name__}, {reason}")
        if not self._eager_from_now_on:
            for name, optimizer in self.optimizers.items():
                make_replayable(optimizer, self.runtime.device)
                bases = [torch.tensor(base, device=self.runtime.device) for base in self.base_lrs[name]]
                self._lrs += [(group["lr"], base) for group, base in zip(optimizer.param_groups, bases, strict=True)]
                self.steps[name] = bare_step(optimizer)

    def at_once(self, room: int) -> int:
        """The largest power of two within `room` and MOST."""
        if self._eager_from_now_on or sum(self._steps_of.values()) < self.WARM_UP:
            return 1
        return 1 << (min(room, self.MOST).bit_length() - 1)

    def begin_check(self) -> int:
        """The first step after the warm-up is compared."""
        return self.WARM_UP + 1

    def proof(self) -> str:
        """How many graphs were found to do what the eager engine does."""
        graphs = f"{self.num_compared} graph{'s' * (self.num_compared > 1)}"
        return f", {graphs} with the recipe's results" if self.num_compared else ""

    def set_lr(self, factors: Sequence[float]) -> None:
        """Sets every learning rate to the recipe's own times a factor, one for each step of the next batch."""
        self._factors = factors
        if not self._lrs:
            super().set_lr(factors)

    def __call__(self, batch: GlobalBatch) -> Losses:
        """Takes the batch's steps; returns the unscaled losses that they were taken on, step after step."""
        if self._eager_from_now_on:
            return self._eagerly(batch)
        if batch.epoch != self._epoch:
            self._epoch = batch.epoch
            self._key.fill_(key_of(self.seed, batch.epoch))
        shape = (batch.size, *((m.size, *(t.shape[1:] for t in m.raw)) for m in batch.micro_batches))
        if (captured := self._captured.get((shape, batch.steps))) is not None:
            return self._replayed(captured, batch)
        before = self._steps_of.get(shape, 0)
        self._steps_of[shape] = before + batch.steps
        if len(self._steps_of) > self.MOST_SHAPES:
            self._give_up(f"batches have more than {self.MOST_SHAPES} shapes")
            return self._eagerly(batch)
        if before >= self.WARM_UP:
            return self._record((shape, batch.steps), batch)
        state = PythonState(*self._watched)
        losses = self._eagerly(batch)
        if changed := state.changed():
            self._give_up(f"a step changes {changed}")
        return losses

    def free(self) -> None:
        """A graph keeps the memory that its steps need."""
        super().free()
        self._captured.clear()
        self._steps_of.clear()
        self._flat.clear()

    def inputs(self, batch: GlobalBatch, micro: MicroBatch) -> Batch:
        """See EagerStep.inputs; the epoch's random numbers follow from a tensor."""
        if self._eager_from_now_on or self.augment is None:
            return super().inputs(batch, micro)
        numbers = micro.numbers.to(self.runtime.device)
        return self.augment(self.prepare(micro.raw), ExampleRandom(self.seed, batch.epoch, numbers, key=self._key))

    def _average(self, name: str) -> None:
        if self.runtime.world_size > 1:
            flat = self._flat_gradients(name)
            self._flat.setdefault(name, torch.empty_like(flat))
            self._spread(name, self.runtime.sum(flat))

    def _on_device(self, factors: Sequence[float]) -> Tensor:
        """float32 [steps]; sent without waiting for what the device is doing."""
        cuda = self.runtime.device.type == "cuda"
        return torch.tensor(factors, pin_memory=cuda).to(self.runtime.device, non_blocking=True)

    def _set_factor(self, factor: Tensor) -> None:
        for lr, base in self._lrs:
            torch.mul(base, factor, out=lr)

    def _eagerly(self, batch: GlobalBatch) -> Losses:
        losses: Losses = {name: [] for name in self.objectives}
        norms: dict[str, list[Tensor]] = {}
        factors = self._on_device(self._factors) if self._lrs else None
        for number in range(batch.steps):
            if factors is not None:
                self._set_factor(factors[number])
            for name, found in super().__call__(_single(batch, number)).items():
                losses[name] += found
            for name, norm in self.norms.items():
                norms.setdefault(name, []).append(norm)
        self.norms = {name: torch.stack(values) for name, values in norms.items()}
        if batch.steps == 1:
            return losses
        return {
            name: [_like(parts[0], [torch.cat(t) for t in zip(*map(_tensors, parts), strict=True)])]
            for name, parts in losses.items()
        }

    def _replayed(self, captured: _Captured, batch: GlobalBatch) -> Losses:
        for place, given in zip(captured.inputs, self._given(batch), strict=True):
            place.copy_(given)
        if self._factors != captured.sent:
            captured.factors.copy_(self._on_device(self._factors))
            captured.sent = self._factors
        for phase in captured.phases:
            phase()
        # copied: the next replay writes to the same places
        self.norms = {name: norm.clone() for name, norm in captured.norms.items()}
        return {
            name: [_like(part, [t.flatten(0, 1).clone() for t in _tensors(part)]) for part in parts]
            for name, parts in captured.losses.items()
        }

    def _given(self, batch: GlobalBatch) -> list[Tensor]:
        """What of a batch goes into its steps."""
        numbers = [] if self.augment is None else [micro.numbers for micro in batch.micro_batches]
        return [*(tensor for micro in batch.micro_batches for tensor in micro.raw), *numbers]

    def _record(self, key: Any, batch: GlobalBatch) -> Losses:
        """Captures such a batch's steps and compares them with eager ones; takes the batch's, eagerly."""
        restore = self._restorable()
        replayed: list[Tensor] = []
        captured, reason = None, ""
        try:
            with self.graphs.watched():
                probe = EagerStep.__call__(self, _single(batch, 0))
            restore()
            captured = self._capture(batch, probe)
            restore()
            replayed = self._outcome(self._replayed(captured, batch))
        except RuntimeError as error:
            reason = _cause(error)
        restore()
        if reason := self._first_of_all(reason):
            self._give_up(reason)
            return self._eagerly(batch)
        losses = self._eagerly(batch)
        found = self._outcome(losses)
        if not same_bits(replayed, found):
            restore()
            losses = self._eagerly(batch)
            steady = same_bits(self._outcome(losses), found)  # else operations do not give the same bits each time
            if steady or not relative_difference(replayed[:-1], found[:-1]) <= self.TOLERANCE:
                reason = "a replay does not give the recipe's bits"
        if reason := self._first_of_all(reason):
            self._give_up(reason)
        elif captured is not None:
            self.num_compared += 1
            self._captured[key] = captured
        return losses

    def _first_of_all(self, reason: str) -> str:
        """The first process's reason that has one."""
        return next((found for found in self.runtime.gather_objects(reason) if found), "")

    def _capture(self, batch: GlobalBatch, probe: Losses) -> _Captured:
        """Records the batch's steps; `probe` are the losses of one."""
        device, steps = self.runtime.device, batch.steps
        parallel = self.runtime.world_size > 1
        if parallel and any(isinstance(part, Weighted) for parts in probe.values() for part in parts):
            raise RuntimeError("the processes exchange the losses' weights within a step")
        places = tuple(
            MicroBatch(tuple(t.clone() for t in micro.raw), micro.size, micro.numbers.to(device, copy=True))
            for micro in batch.micro_batches
        )
        batch = dataclasses.replace(batch, micro_batches=places)
        room = {
            name: [_like(part, [_room(t, steps) for t in _tensors(part)]) for part in probe[name]] for name in probe
        }
        norms = {name: _room(norm, steps) for name, norm in self.norms.items()}
        factors = self._on_device(self._factors)

        def keep(name: str, found: list[Tensor | Weighted], number: int) -> None:
            for place, part in zip(room[name], found, strict=True):
                for kept, values in zip(_tensors(place), _tensors(part), strict=True):
                    kept[number].copy_(values)

        def keep_norms(number: int) -> None:
            for name, norm in self.norms.items():
                norms[name][number].copy_(norm)

        def all_steps() -> None:
            for number in range(steps):
                self._set_factor(factors[number])
                for name, found in EagerStep.__call__(self, _single(batch, number)).items():
                    keep(name, found, number)
                keep_norms(number)

        def forward_and_backward(name: str) -> None:
            self._set_factor(factors[0])
            prepared = [(self.inputs(batch, micro), micro) for micro in batch.micro_batches]
            keep(name, self._gradients(name, prepared, batch.size), 0)
            self._flat[name].copy_(self._flat_gradients(name))

        def update(name: str) -> None:
            self._spread(name, self._flat[name])
            self._update(name, [], batch.size)
            keep_norms(0)

        phases: list[Callable[[], object]] = []
        if parallel:
            for name in self.objectives:
                phases.append(self.graphs.capture(partial(forward_and_backward, name)))
                phases.append(partial(self.runtime.sum, self._flat[name]))
                phases.append(self.graphs.capture(partial(update, name)))
        else:
            phases.append(self.graphs.capture(all_steps))
        weights = list(self._weights.values())
        return _Captured(phases, self._given(batch), factors, self._factors, room, norms, weights)

    def _restorable(self) -> Callable[[], None]:
        """Gives a function that puts weights, statistics, optimizers and random numbers back as they are now."""
        cuda = self.runtime.device.type == "cuda"
        state = self._state()
        before = [tensor.detach().clone() for tensor in state]
        random = torch.get_rng_state(), torch.cuda.get_rng_state(self.runtime.device) if cuda else None

        def restore() -> None:
            with torch.no_grad():
                torch._foreach_copy_(state, before)
            for parameters in self.parameters.values():
                for parameter in parameters:
                    parameter.grad = None
            torch.set_rng_state(random[0])
            if random[1] is not None:
                torch.cuda.set_rng_state(random[1], self.runtime.device)

        return restore

    def _state(self) -> list[Tensor]:
        of_optimizers = [
            value
            for optimizer in self.optimizers.values()
            for of_parameter in optimizer.state.values()
            for value in of_parameter.values()
            if isinstance(value, Tensor)
        ]
        return [*(p for n in self.networks.values() for p in n.parameters()), *self._buffers, *of_optimizers]

    def _outcome(self, losses: Losses) -> list[Tensor]:
        """All that steps have changed, copied."""
        found = [torch.cat([t for part in parts for t in _tensors(part)]) for parts in losses.values()]
        random = [torch.get_rng_state()]
        if self.runtime.device.type == "cuda":
            random.append(torch.cuda.get_rng_state(self.runtime.device))
        return [*found, *(tensor.detach().clone() for tensor in self._state()), torch.cat(random)]


def _single(batch: GlobalBatch, number: int) -> GlobalBatch:
    """Step `number` of those that a batch holds."""
    if batch.steps == 1:
        return batch
    (micro,) = batch.micro_batches
    own = slice(number * batch.size, (number + 1) * batch.size)
    one = MicroBatch(tuple(t[own] for t in micro.raw), micro.size, micro.numbers[own])
    return GlobalBatch(batch.epoch, batch.index + number, batch.size, (one,))


def _cause(error: RuntimeError) -> str:
    """A line on what went wrong first: where a step can't be captured, to end the capture fails too, and says less."""
    while isinstance(error.__context__, RuntimeError) and not error.__suppress_context__:
        error = error.__context__
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _tensors(part: Tensor | Weighted) -> tuple[Tensor, ...]:
    return tuple(part) if isinstance(part, Weighted) else (part,)


def _like(part: Tensor | Weighted, tensors: Sequence[Tensor]) -> Tensor | Weighted:
    return Weighted(*tensors) if isinstance(part, Weighted) else tensors[0]


def _room(tensor: Tensor, steps: int) -> Tensor:
    return torch.empty((steps, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
