"""The step engines beyond the eager one, and which of them a run gets."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import local, whole_tensor
from .config import EngineName
from .data import GlobalBatch, MicroBatch
from .errors import TrainingError, UserError, out_of_memory
from .graphs import GraphStep
from .metrics import Weighted
from .recipe import Batch
from .replay import ReplayingStep
from .runtime import Runtime
from .step import EagerStep, gradients
from .tape import NotReplayable, PythonState, Tape, relative_difference, same_bits


def engine_called(
    name: EngineName, runtime: Runtime, *, divided: bool = False, recomputed: bool = False
) -> type[EagerStep]:
    """The engine called `name`; "auto" is the fastest that gives the eager one's bits.

    divided: whether the networks are split over the processes. recomputed: whether blocks are run again in the backward
    pass.
    Raises UserError where the engine can't serve such a run.
    """
    kind = runtime.device.type
    obstacle = ""
    if kind not in {"graph": ("cuda",), "compile": ("cpu", "cuda")}.get(name, ("cpu",)):
        obstacle = f"serves {'GPUs' if name == 'graph' else 'CPUs'}, and this is {kind}"
    elif runtime.scaler is not None:
        obstacle = "does not serve fp16's gradient scaler"
    elif name == "compile" and runtime.world_size > 1:
        obstacle = f"serves one process, and there are {runtime.world_size}"
    elif divided or recomputed:
        obstacle = f"does not serve {'--shard fsdp' if divided else '--checkpoint-activations'}"
    if name not in ("auto", "eager") and obstacle:
        raise UserError(f"--engine {name}: {obstacle}; use --engine eager")
    if name == "graph":
        return GraphStep
    if divided:
        return DividedStep
    if name == "eager" or obstacle:
        return EagerStep
    return CompiledStep if name == "compile" else TapedStep


class DividedStep(EagerStep):
    """The eager step over networks that are split over the processes (see fsdp.FullyShard).

    Gradients are summed and split block by block within the backward pass, of every micro-batch: to keep those of a
    whole network until the last one would take the memory that splitting saves.
    """

    def _wrap(self, network: nn.Module) -> nn.Module:
        # A block that gives views, as attention's keys are, is warned about: adding to one in place would go wrong
        warnings.filterwarnings("ignore", message=".*returned a view tensor")
        return self.runtime.wrap(network, ddp=False)

    def rehearse(self, give_batch: Callable[[], GlobalBatch]) -> None:
        """Nothing: gradients are summed in one order, from the first step on."""

    def _clip(self, parameters: list[nn.Parameter], clip_norm: float) -> Tensor:
        found = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = whole_tensor(nn.utils.get_total_norm(found))
        factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        torch._foreach_mul_([local(gradient) for gradient in found], factor)
        return norm


@dataclass(slots=True)
class _Shape:
    """What is known of the steps over batches of one shape."""

    count: int = 0
    tape: Tape | None = None
    fastest: float = math.inf  # seconds of an eager step
    next_check: int = 0
    weighted: bool = False
    compiled: Callable[..., Any] | None = None
    long: bool = False  # its steps take so long that they are run eagerly


class TapedStep(ReplayingStep):
    """Runs forward and backward from a tape (see tape.Tape): the eager engine's bits in less time.

    The first two steps over batches of some shape are run eagerly, the third is recorded, and the fourth is run both
    ways and compared bit by bit, as are the eighth, the sixteenth and so on. A recipe that a tape can't hold is run
    eagerly, after one line that says why. For CPUs, without fp16's scaler.

    """

    name = "tape"
    LONGEST = 0.02  # seconds: of a longer step there is next to nothing to save, and the tape's memory counts
    MOST_SHAPES = 16

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._shapes: dict[Any, _Shape] = {}
        self._prepares_on_tape = self.augment is None and len(self.objectives) == 1

    def begin_check(self) -> int:
        """The fourth step is the first that is compared, however long it takes."""
        self.LONGEST = math.inf
        return 4

    def proof(self) -> str:
        """How many steps had the eager engine's bits."""
        return f", {self.num_compared} of them replayed with the recipe's bits" if self.num_compared else ""

    def _average(self, name: str) -> None:
        """Averages over the processes; a parameter that one does not use in this step has a gradient of 0 there."""
        if self.runtime.world_size == 1:
            return
        parameters = self.parameters[name]
        flat = [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters]
        used = torch.tensor([p.grad is not None for p in parameters], dtype=flat[0].dtype)
        total = torch.cat([*flat, used])
        if self.runtime.gradient_compression == "bf16":
            total = total.to(torch.bfloat16)
        *sums, counts = self.runtime.sum(total).split([*(p.numel() for p in parameters), len(parameters)])
        found, means = [], []
        for parameter, mean, count in zip(parameters, sums, counts.tolist(), strict=True):
            if count:  # some process uses it
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                found.append(parameter.grad)
                means.append(mean.view(parameter.shape))
        total.div_(self.runtime.world_size)  # and so the means, which are its parts
        torch._foreach_copy_(found, means)

    def inputs(self, batch: GlobalBatch, micro: MicroBatch) -> Batch:
        """The raw batch where the tape prepares it, else as the networks get it."""
        return micro.raw if self._prepares_on_tape else super().inputs(batch, micro)

    def _backward(
        self, name: str, networks: Mapping[str, nn.Module], inputs: Batch, micro: MicroBatch, size: int
    ) -> Tensor | Weighted:
        if self._eager_from_now_on:
            return super()._backward(name, networks, self._prepared(inputs), micro, size)
        key = self._key(name, micro, inputs, size)
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._shapes[key] = _Shape()
            if len(self._shapes) > self.MOST_SHAPES:
                self._give_up(f"batches have more than {self.MOST_SHAPES} shapes")
        if shape.long:
            return super()._backward(name, networks, self._prepared(inputs), micro, size)
        if shape.compiled is not None:
            return self._kept(name, shape, shape.compiled(*inputs))
        shape.count += 1
        if shape.tape is not None and shape.count != shape.next_check:
            return self._kept(name, shape, shape.tape(*inputs))

        function = self._function(name, networks, micro, size, shape)
        return self._kept(name, shape, self._slowly(function, inputs, shape))

    def free(self) -> None:
        """Tapes hold what their steps gave when they were recorded."""
        super().free()
        self._shapes = {}

    @staticmethod
    def _key(name: str, micro: MicroBatch, inputs: Batch, size: int) -> Any:
        return (name, micro.size, size, *[tensor.shape for tensor in inputs])

    def _function(
        self, name: str, networks: Mapping[str, nn.Module], micro: MicroBatch, size: int, shape: _Shape
    ) -> Callable[..., tuple[Tensor | None, ...]]:
        """The recipe's own step over such a micro-batch, as a function: inputs -> losses, gradients."""

        def function(*inputs: Tensor) -> tuple[Tensor | None, ...]:
            loss, weights, kept = self._loss(name, networks, self._prepared(inputs), micro, size)
            shape.weighted = isinstance(kept, Weighted)
            losses = kept if isinstance(kept, Weighted) else (kept,)
            return (*losses, *gradients(loss, weights, self.parameters[name]))

        return function

    def _slowly(self, function: Callable[..., Any], inputs: Batch, shape: _Shape) -> tuple[Tensor | None, ...]:
        """Losses and gradients of a step that is run eagerly, recorded, or compared."""
        if shape.count <= 2 or shape.fastest > self.LONGEST:
            began = time.perf_counter()
            found = function(*inputs)
            if shape.count > 1:  # the first warms up
                shape.fastest = min(shape.fastest, time.perf_counter() - began)
            if shape.count == 5 and shape.fastest > self.LONGEST:  # a machine that is busy may delay one of them
                shape.long = True  # this shape only: another one may have been compiled, which has not these bits
                self.note = "long steps, run eagerly"
            return found
        if shape.tape is not None:
            shape.next_check = 2 * shape.count
            return self._compared(function, inputs, shape.tape)
        state, repeat = PythonState(*self._watched), self._repeatable()
        try:
            shape.tape = Tape(function, inputs)
        except NotReplayable as error:
            self._give_up(error.args[0])
            return error.args[1]
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        if shape.tape is None:  # while it is written down all that a step computes is kept
            self._give_up("there is no memory for a tape")
            repeat()
            return function(*inputs)
        if changed := state.changed():
            self._give_up(f"a step changes {changed}")
        shape.next_check = shape.count + 1
        return shape.tape.outputs

    def _compared(self, function: Callable[..., Any], inputs: Batch, tape: Tape) -> tuple[Tensor | None, ...]:
        """What the function gives, after it was compared with the tape."""
        repeat = self._repeatable()

        def outcome(run: Callable[..., Any]) -> list[Tensor | None]:
            repeat()
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
            # not where either of them differs from itself: an operation that does not give the same bits each time
            steady = same_bits(outcome(tape), replayed) and same_bits(outcome(function), found)
            if self.num_compared > 1 and steady:
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
        super()._give_up(reason)
        self._shapes = {}


class CompiledStep(TapedStep):
    """Has torch compile the tape of a whole batch's step: operations between matrix products become one kernel.

    It agrees with the eager engine up to rounding, which is compared before the first step. So that a run which goes on
    has the bits of one that never stopped, every step over a whole batch is compiled, from the first one on; a last
    batch that is smaller is replayed. Compiling takes 3 to 10 s, from torch's cache 1 to 3.
    """

    name = "compile"
    TOLERANCE = 1e-3  # see relative_difference
    difference = 0.0

    def begin_check(self) -> int:
        """It was compared before the first step."""
        return 1

    def proof(self) -> str:
        """How far it was from the eager engine."""
        compiled = any(shape.compiled for shape in self._shapes.values())
        return f", compiled, within {self.difference:.1g} of the recipe's" if compiled else ""

    def rehearse(self, give_batch: Callable[[], GlobalBatch]) -> None:
        """Records and compiles the step of each objective over such a batch."""
        if self._eager_from_now_on:
            return
        if self.runtime.is_main:
            print("engine   compiling the step; takes some seconds", flush=True)
        repeat, batch = self._repeatable(), give_batch()
        try:
            for micro in batch.micro_batches:
                for name in self.objectives:
                    with self._only(name) as networks:
                        self.difference = max(self.difference, self._compile(name, networks, micro, batch))
        except (NotReplayable, RuntimeError) as error:
            why = error.args[0] if isinstance(error, NotReplayable) else f"{type(error).__name__}: {error}"
            self._give_up(why.strip().splitlines()[0][:200])
        repeat()
        if not self.difference <= self.TOLERANCE:
            self._give_up(f"compiled, it differs from the recipe's own by {self.difference:.1g}")

    def _compile(self, name: str, networks: Mapping[str, nn.Module], micro: MicroBatch, batch: GlobalBatch) -> float:
        """The largest difference from the eager step, relative to the largest element of the tensor."""
        inputs = self.inputs(batch, micro)
        key = self._key(name, micro, inputs, batch.size)
        if key in self._shapes:
            return 0.0
        shape = _Shape()
        function = self._function(name, networks, micro, batch.size, shape)
        repeat = self._repeatable()
        state = PythonState(*self._watched)
        tape = Tape(function, inputs, quick=False)
        if changed := state.changed():
            raise NotReplayable(f"a step changes {changed}")
        options: dict[str, Any] = {"fallback_random": True}  # torch's own random numbers, as everywhere
        if skip := getattr(torch.compiler, "skip_all_guards_unsafe", None):
            options["guard_filter_fn"] = skip  # what they guard is in the key
        run = torch.compile(tape.run, dynamic=False, options=options)
        repeat()
        with torch.no_grad():
            found = run(*inputs)

        def compiled(*inputs: Tensor) -> Any:
            with torch.no_grad():
                return run(*inputs)

        shape.compiled = compiled
        self._shapes[key] = shape
        num_losses = 2 if shape.weighted else 1
        return max(
            relative_difference(found[:num_losses], tape.outputs[:num_losses]),
            relative_difference(found[num_losses:], tape.outputs[num_losses:]),
        )
