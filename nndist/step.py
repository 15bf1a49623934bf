"""One optimizer step: forward, backward and update of each objective in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .blocks import local
from .data import Data, ExampleRandom, GlobalBatch, MicroBatch
from .errors import ShortOfMemory, UserError, first_line, out_of_memory
from .metrics import Weighted
from .optimizers import bare_step
from .recipe import Batch, Recipe
from .runtime import GlobalBatchNorm, Runtime

T = TypeVar("T")
Losses = dict[str, list[Tensor | Weighted]]
"""Objective name -> this process's per-example losses, one tensor per micro-batch, without padding."""


class EagerStep:
    """Runs each step as PyTorch does, operation by operation.

    The gradient is that of the mean loss over the global batch, whatever the number of processes and micro-batches:
    with n examples in all, each example's loss enters this process's backward pass with weight world_size / n, because
    DDP then averages over the processes. Of `Weighted` losses the divisor is known only when all processes have seen
    all their micro-batches: the gradients are then multiplied by n / (sum of weights), before they are clipped.
    """

    name = "eager"
    MOST_UNDONE = 2  # steps

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        networks: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        runtime: Runtime,
        seed: int,
    ):
        self.recipe = recipe
        self.runtime = runtime
        self.prepare, self.augment, self.seed = data.prepare, data.augment, seed
        self.optimizers = optimizers
        self.steps = {name: bare_step(optimizer) for name, optimizer in optimizers.items()}
        self.clip_norm = recipe.clip_norm
        self.objectives = recipe.objectives()
        self.networks = networks
        self.base_lrs = {name: [group["lr"] for group in opt.param_groups] for name, opt in optimizers.items()}
        self.wrapped = {name: self._wrap(network) for name, network in networks.items()}
        self.parameters = {name: [p for p in n.parameters() if p.requires_grad] for name, n in networks.items()}
        self.batch_norms = [m for n in networks.values() for m in n.modules() if isinstance(m, GlobalBatchNorm)]
        self.say: Callable[[str], None] = lambda line: None
        self.note = ""  # what a person should know of how the steps are run
        self.norms: dict[str, Tensor] = {}  # of the last step's gradients before clipping, where there is clipping
        self._steps = 0  # since the micro-batches have the size that they have
        self.updated: Losses = {}  # of the next step's objectives, those that are already (see errors.ShortOfMemory)
        self._buffers = [buffer for network in networks.values() for buffer in network.buffers()]
        self._weights: dict[tuple[torch.Size, int], Tensor] = {}
        for name in self.objectives:
            if name not in networks:
                raise UserError(
                    f"recipe {recipe.name}: objective {name!r} has no network of that name; "
                    f"networks() gives {', '.join(networks)}"
                )

    def _wrap(self, network: nn.Module) -> nn.Module:
        """The network as the backward pass needs it; DDP averages the gradients of several processes within that."""
        return self.runtime.wrap(network)

    def _average(self, name: str) -> None:
        """Averages the gradients over the processes, where the backward pass has not done so."""

    def begin_check(self) -> int:
        """How many steps show that the engine does what the recipe says."""
        return 1

    def proof(self) -> str:
        """What comparison with the eager engine has shown, for `--check`."""
        return ""

    def at_once(self, room: int) -> int:
        """How many of the next `room` batches, all whole, the engine wants together as one GlobalBatch."""
        return 1

    def set_lr(self, factors: Sequence[float]) -> None:
        """Sets every learning rate to the recipe's own times a factor, one for each step of the next batch."""
        for name, optimizer in self.optimizers.items():
            for group, base in zip(optimizer.param_groups, self.base_lrs[name], strict=True):
                group["lr"] = base * factors[0]

    def __call__(self, batch: GlobalBatch) -> Losses:
        """Takes one optimizer step of every objective; returns the unscaled losses that it was taken on.

        Raises ShortOfMemory where a forward or backward pass is.
        """
        losses, self.updated = self.updated, {}
        self._steps += 1
        prepared = self._undone_if_short(
            lambda: [(self.inputs(batch, micro), micro) for micro in batch.micro_batches], losses
        )
        for name in self.objectives:
            if name in losses:
                continue
            losses[name] = self._undone_if_short(partial(self._gradients, name, prepared, batch.size), losses)
            self._average(name)
            self._update(name, losses[name], batch.size)
        if self.runtime.scaler is not None:
            self.runtime.scaler.update()
        return losses

    def _undone_if_short(self, work: Callable[[], T], updated: Losses) -> T:
        """What `work`, passes of one objective, gives; raises ShortOfMemory after undoing it.

        Random numbers and running statistics are put back in the first steps only: to copy them takes time, and it is
        the first step that turns out too large, or the second, beside what the optimizer has come to keep.
        """
        undo = self._repeatable() if self._steps <= self.MOST_UNDONE else lambda: None
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            said = first_line(error)
        # only here are the error and its frames gone, which hold the memory
        for name in self.objectives:
            for parameter in self.parameters[name]:
                parameter.grad = None
        undo()
        raise ShortOfMemory(said, updated)

    def _repeatable(self) -> Callable[[], None]:
        """Gives a function that puts random numbers and running statistics back as they are now."""
        before = [buffer.clone() for buffer in self._buffers]
        cuda = self.runtime.device.type == "cuda"
        random = torch.get_rng_state(), torch.cuda.get_rng_state(self.runtime.device) if cuda else None

        def repeat() -> None:
            torch.set_rng_state(random[0])
            if random[1] is not None:
                torch.cuda.set_rng_state(random[1], self.runtime.device)
            with torch.no_grad():
                for buffer, value in zip(self._buffers, before, strict=True):
                    buffer.copy_(value)

        return repeat

    def free(self) -> None:
        """Lets go of what is kept for speed only; other micro-batches are to come."""
        self._weights.clear()
        self._steps = 0

    def fits(self, give_batch: Callable[[], GlobalBatch]) -> bool:
        """Whether this process has the memory for the passes over a first micro-batch; all is undone.

        No other process is waited for, so that each finds out by itself. Room for two tensors of each parameter is
        taken for what the optimizer will keep.
        """
        undo, fits = self._repeatable(), True
        for module in self.batch_norms:
            module.alone = True
        try:
            self._try(give_batch())
        except (RuntimeError, MemoryError, ValueError) as error:
            fits = "more than 1 value per channel" in str(error)  # BatchNorm of one example, which all have together
            if not fits and not out_of_memory(error):
                raise
        finally:
            for module in self.batch_norms:
                module.alone = False
        undo()
        return fits

    def _try(self, batch: GlobalBatch) -> None:
        micro = batch.micro_batches[0]
        inputs = EagerStep.inputs(self, batch, micro)
        kept = [
            torch.empty_like(parameter)
            for name, parameters in self.parameters.items()
            if not self.optimizers[name].state
            for parameter in (*parameters, *parameters)
        ]
        for name in self.objectives:
            with self._only(name):
                loss, weights, _ = self._loss(name, self.networks, inputs, micro, batch.size)
                gradients(loss, weights, self.parameters[name])
        del kept

    def inputs(self, batch: GlobalBatch, micro: MicroBatch) -> Batch:
        """A micro-batch as the networks get it: prepared and, where the recipe says so, augmented."""
        prepared = self.prepare(micro.raw)
        if self.augment is None:
            return prepared
        numbers = micro.numbers.to(self.runtime.device)
        return self.augment(prepared, ExampleRandom(self.seed, batch.epoch, numbers))

    def rehearse(self, give_batch: Callable[[], GlobalBatch]) -> None:
        """Gets ready for the first step, on some whole batch; every effect is undone. Nothing for one process.

        DDP lays its gradient buckets out anew after the first backward pass, and so sums in another order from then
        on: with three or more processes a run that is resumed would differ in bits from one that was not interrupted.
        """
        if self.runtime.world_size == 1:
            return
        batch = give_batch()
        kept = [buffer.clone() for buffer in self._buffers]
        micro = batch.micro_batches[0]
        for name in self.objectives:
            with self._only(name) as networks:
                self._backward(name, networks, self.inputs(batch, micro), micro, batch.size)
            for parameter in self.parameters[name]:
                parameter.grad = None
        with torch.no_grad():
            for buffer, value in zip(self._buffers, kept, strict=True):
                buffer.copy_(value)

    def _gradients(self, name: str, prepared: list[tuple[Batch, MicroBatch]], size: int) -> list[Tensor | Weighted]:
        """Forward and backward over the micro-batches; returns their losses."""
        losses = []
        with self._only(name) as networks:
            for number, (inputs, micro) in enumerate(prepared, 1):
                with self._synchronised(name, number == len(prepared)):
                    losses.append(self._backward(name, networks, inputs, micro, size))
        return losses

    def _update(self, name: str, losses: list[Tensor | Weighted], size: int) -> None:
        """One optimizer step of the network called `name`, from the gradients of its parameters, which are used up."""
        optimizer, scaler, parameters = self.optimizers[name], self.runtime.scaler, self.parameters[name]
        weights = [loss.weights.sum() for loss in losses if isinstance(loss, Weighted)]
        if weights:
            total = self.runtime.sum(torch.stack(weights).sum())
            gradients = [local(p.grad) for p in parameters if p.grad is not None]
            torch._foreach_mul_(gradients, torch.where(total > 0, size / total, 0.0).to(gradients[0].dtype))
        if scaler is not None:
            scaler.unscale_(optimizer)
        if self.clip_norm is not None:
            self.norms[name] = self._clip(parameters, self.clip_norm)
        if scaler is None:
            self.steps[name]()
        else:
            scaler.step(optimizer)
        for parameter in parameters:
            parameter.grad = None

    def _clip(self, parameters: list[nn.Parameter], clip_norm: float) -> Tensor:
        """Scales the gradients down to the norm where theirs is larger; gives what theirs was."""
        return nn.utils.clip_grad_norm_(parameters, clip_norm)

    def _backward(
        self, name: str, networks: Mapping[str, nn.Module], inputs: Batch, micro: MicroBatch, size: int
    ) -> Tensor | Weighted:
        """Adds the gradients of a micro-batch to those of the network's parameters; returns its losses."""
        loss, weights, kept = self._loss(name, networks, inputs, micro, size)
        backward(loss, weights)
        return kept

    def _loss(
        self, name: str, networks: Mapping[str, nn.Module], inputs: Batch, micro: MicroBatch, size: int
    ) -> tuple[Tensor, Tensor, Tensor | Weighted]:
        """The losses of a micro-batch, what each weighs in the backward pass, and what is kept of them."""
        for module in self.batch_norms:
            module.padding = 1 - micro.size if micro.size < 1 else 0
        with self.runtime.autocast():
            given = self.objectives[name](networks, inputs)
        loss = given.values if isinstance(given, Weighted) else given
        if loss.dim() == 0 or len(loss) != max(1, micro.size):
            raise UserError(
                f"objective {name!r}: gives a loss of shape {tuple(loss.shape)} for {max(1, micro.size)} examples; "
                "it must give one loss per example (with reduction='none'), the loop takes the mean"
            )
        if isinstance(given, Weighted):
            if given.weights.shape != loss.shape:
                raise UserError(
                    f"objective {name!r}: weights of shape {tuple(given.weights.shape)} for losses of shape "
                    f"{tuple(loss.shape)}; they must have the same shape"
                )
            weights = given.weights.to(loss.dtype) * (self.runtime.world_size / size if micro.size else 0.0)
        else:
            weights = self._example_weights(loss, micro.size, size)
        if self.runtime.scaler is not None:
            weights = self.runtime.scaler.scale(weights)
        if isinstance(given, Weighted):
            return loss, weights, Weighted(*(tensor[: micro.size] for tensor in given.per_example()))
        losses = loss.detach()
        losses = losses[: micro.size] if micro.size < len(losses) else losses
        # one per example is kept
        return loss, weights, losses if losses.dim() == 1 else losses.flatten(1).double().mean(1)

    def _example_weights(self, loss: Tensor, counted: int, size: int) -> Tensor:
        """What each loss weighs in the backward pass, shape of `loss`: world_size / n, or 0 for padding."""
        key = (loss.shape, size if counted else 0)
        if key not in self._weights:
            if len(self._weights) > 64:  # lengths that vary from batch to batch
                self._weights.clear()
            per_example = loss.numel() // len(loss)
            weight = self.runtime.world_size / (size * per_example) if counted else 0.0
            self._weights[key] = torch.full_like(loss, weight, memory_format=torch.contiguous_format).detach()
        return self._weights[key]

    def _synchronised(self, name: str, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are averaged over the processes with the last micro-batch only."""
        wrapped = self.wrapped[name]
        if last or not isinstance(wrapped, DistributedDataParallel):
            return contextlib.nullcontext()
        return wrapped.no_sync()

    @contextlib.contextmanager
    def _only(self, name: str) -> Iterator[Mapping[str, nn.Module]]:
        """The networks for one objective: its own one wrapped, the others plain and without gradients."""
        if len(self.networks) == 1:
            yield self.wrapped
            return
        others = [p for other, parameters in self.parameters.items() if other != name for p in parameters]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield {**self.networks, name: self.wrapped[name]}
        finally:
            for parameter in others:
                parameter.requires_grad_(True)


def backward(loss: Tensor, weights: Tensor) -> None:
    """`loss.backward(weights)` for shapes that are known to agree; the mean's own kernels are saved.

    torch checks them by its symbolic shapes, which takes 0.7 s to import and 30 us a step (measured on torch 2.14.1).
    """
    torch.autograd.Variable._execution_engine.run_backward(
        *((loss,), (weights,), False, False, ()), allow_unreachable=True, accumulate_grad=True
    )


def gradients(loss: Tensor, weights: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """What `backward` would leave in each parameter's grad, None where it would leave nothing; none is changed.

    Like those they are laid out as their parameters are, and share no memory.
    """
    found = torch.autograd.Variable._execution_engine.run_backward(
        *((loss,), (weights,), False, False, tuple(parameters)), allow_unreachable=True, accumulate_grad=False
    )
    taken = {weights.untyped_storage().data_ptr()}
    for number, (parameter, gradient) in enumerate(zip(parameters, found, strict=True)):
        if gradient is None or gradient.layout != torch.strided:
            continue
        place = gradient.untyped_storage().data_ptr()
        if place in taken or gradient.stride() != parameter.stride():
            found = (*found[:number], torch.empty_like(parameter).copy_(gradient), *found[number + 1 :])
        taken.add(place)
    return list(found)
