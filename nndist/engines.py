"""The step engines beyond the eager one, and which of them a run gets."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .config import EngineName
from .data import Data, GlobalBatch, MicroBatch
from .errors import TrainingError, UserError
from .metrics import Weighted
from .recipe import Batch, Recipe
from .runtime import Runtime
from .step import EagerStep, gradients
from .tape import NotReplayable, PythonState, Tape, same_bits


def make_engine(
    name: EngineName,
    recipe: Recipe,
    data: Data,
    networks: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    runtime: Runtime,
    seed: int,
) -> EagerStep:
    """The engine called `name`; "auto" chooses the fastest that gives the eager one's bits.

    Raises UserError where the engine can't serve such a run.
    """
    arguments = (recipe, data, networks, optimizers, runtime, seed)
    obstacle = ""
    if runtime.world_size > 1:
        obstacle = f"serves one process, and there are {runtime.world_size}"
    elif runtime.device.type != "cpu":
        obstacle = f"serves a CPU, and this is {runtime.device.type}"
    if name == "tape" and obstacle:
        raise UserError(f"--engine tape: {obstacle}; use --engine eager")
    return EagerStep(*arguments) if name == "eager" or obstacle else TapedStep(*arguments)


@dataclass(slots=True)
class _Shape:
    """What is known of the steps over batches of one shape."""

    count: int = 0
    tape: Tape | None = None
    next_check: int = 0
    weighted: bool = False


class TapedStep(EagerStep):
    """Runs forward and backward from a tape (see tape.Tape): the eager engine's bits in less time.

    The first two steps over batches of some shape are run eagerly, the third is recorded, and the fourth is run both
    ways and compared bit by bit, as are the eighth, the sixteenth and so on. A recipe that a tape can't hold is run
    eagerly, after one line that says why. For one process, without fp16's scaler.
    """

    name = "tape"
    LONGEST = 0.02  # seconds: of a longer step there is next to nothing to save, and the tape's memory counts
    MOST_SHAPES = 16

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.num_compared = 0
        self._shapes: dict[Any, _Shape] = {}
        self._eager_from_now_on = False
        self._prepares_on_tape = self.augment is None and len(self.objectives) == 1
        modules = [module for network in self.networks.values() for module in network.modules()]
        self._watched = [self.recipe, *modules]
        self._buffers = [buffer for network in self.networks.values() for buffer in network.buffers()]
        if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in modules):
            self._give_up("the network has hooks")

    def inputs(self, batch: GlobalBatch, micro: MicroBatch) -> Batch:
        """The raw batch where the tape prepares it, else as the networks get it."""
        return micro.raw if self._prepares_on_tape else super().inputs(batch, micro)

    def _backward(
        self, name: str, networks: Mapping[str, nn.Module], inputs: Batch, micro: MicroBatch, size: int
    ) -> Tensor | Weighted:
        if self._eager_from_now_on:
            return super()._backward(name, networks, self._prepared(inputs), micro, size)
        key = (name, micro.size, size, *[tensor.shape for tensor in inputs])
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._shapes[key] = _Shape()
            if len(self._shapes) > self.MOST_SHAPES:
                self._give_up(f"batches have more than {self.MOST_SHAPES} shapes")
        shape.count += 1
        if shape.tape is not None and shape.count != shape.next_check:
            return self._kept(name, shape, shape.tape(*inputs))

        def function(*inputs: Tensor) -> tuple[Tensor | None, ...]:
            loss, weights, kept = self._loss(name, networks, self._prepared(inputs), micro, size)
            shape.weighted = isinstance(kept, Weighted)
            losses = kept if isinstance(kept, Weighted) else (kept,)
            return (*losses, *gradients(loss, weights, self.parameters[name]))

        return self._kept(name, shape, self._slowly(function, inputs, shape))

    def _slowly(self, function: Callable[..., Any], inputs: Batch, shape: _Shape) -> tuple[Tensor | None, ...]:
        """Losses and gradients of a step that is run eagerly, recorded, or compared."""
        if shape.count <= 2:
            began = time.perf_counter()
            found = function(*inputs)
            if shape.count == 2 and time.perf_counter() - began > self.LONGEST:  # the first warms up
                self._eager_from_now_on = True
                self.note = "long steps, run eagerly"
            return found
        if shape.tape is not None:
            shape.next_check = 2 * shape.count
            return self._compared(function, inputs, shape.tape)
        state = PythonState(*self._watched)
        try:
            shape.tape = Tape(function, inputs)
        except NotReplayable as error:
            self._give_up(error.args[0])
            return error.args[1]
        if changed := state.changed():
            self._give_up(f"a step changes {changed}")
        shape.next_check = shape.count + 1
        return shape.tape.outputs

    def _compared(self, function: Callable[..., Any], inputs: Batch, tape: Tape) -> tuple[Tensor | None, ...]:
        """What the function gives, after it was compared with the tape."""
        before = [buffer.clone() for buffer in self._buffers]
        random = torch.get_rng_state()

        def outcome(run: Callable[..., Any]) -> list[Tensor | None]:
            torch.set_rng_state(random)
            with torch.no_grad():
                for buffer, value in zip(self._buffers, before, strict=True):
                    buffer.copy_(value)
            given = list(run(*inputs))
            return [*given, *(buffer.clone() for buffer in self._buffers), torch.get_rng_state()]

        problem = ""
        replayed: list[Tensor | None] = []
        try:
            replayed = outcome(tape)
        except (RuntimeError, TypeError) as error:
            problem = f"{type(error).__name__}: {error}"
        found = outcome(function)
        self.num_compared += 1
        if not problem and not same_bits(replayed, found):
            if self.num_compared > 1 and same_bits(outcome(function), found):
                raise TrainingError(
                    "a replayed step no longer agrees with the recipe's own: something in the recipe changes from step "
                    "to step that is no tensor; train with --engine eager"
                )
            found = outcome(function)
            problem = "a replay does not give the recipe's bits"
        if problem:
            self._give_up(problem)
        return tuple(found[: len(tape.outputs)])

    def _kept(self, name: str, shape: _Shape, found: tuple[Tensor | None, ...]) -> Tensor | Weighted:
        """Hands the gradients over to the parameters; returns the losses."""
        first = 2 if shape.weighted else 1
        for parameter, gradient in zip(self.parameters[name], found[first:], strict=True):
            if parameter.grad is None:
                parameter.grad = gradient
            elif gradient is not None:
                with torch.no_grad():
                    parameter.grad.add_(gradient)
        return Weighted(*found[:2]) if shape.weighted else found[0]  # type: ignore[arg-type,return-value]

    def _prepared(self, inputs: Batch) -> Batch:
        return self.prepare(inputs) if self._prepares_on_tape else inputs

    def _give_up(self, reason: str) -> None:
        self._eager_from_now_on = True
        self._shapes.clear()
        self.note = f"steps run eagerly, as a tape can't repeat them: {reason}"
        self.say(f"engine   {self.note}")
