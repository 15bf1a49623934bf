"""One optimizer step: forward, backward, all-reduce and update for each objective in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..data.batches import tensors_of
from ..data.feed import GlobalBatch, MicroBatch
from ..data.sets import Data, ExampleRandom
from ..distributed.batch_norm import Sums, is_global
from ..distributed.blocks import local
from ..distributed.runtime import Runtime
from ..distributed.sync import BufferSync, GradientSync
from ..distributed.timing import Timing
from ..errors import ShortOfMemory, UserError, first_line, out_of_memory, place_of
from ..metrics import Forms, Weighted, checked, per_example
from ..recipe.contract import Batch, Networks, Recipe
from ..torch_internals import backward, plain_step
from .compiling import Uncompiled
from .optimizers import (
    closures_after_backward,
    has_own_zero_grad,
    is_for_want_of_closure,
    may_start_from_gradients,
    needs_closure,
)
from .recheck import NoRecheck

Losses = dict[str, list[Tensor | Weighted]]
"""Objective name -> this process's per-example losses, one tensor per micro-batch, without padding."""
Prepared = list[tuple[Batch, MicroBatch]]


@dataclass
class Shortage:
    """reason: why a process ran out of memory in its passes, or ""."""

    reason: str = ""


class Step:
    """Takes optimizer steps as a hand-written loop does, operation by operation.

    The gradient is that of the mean loss over the global batch, whatever the number of processes and micro-batches:
    with n examples in all, each example's loss enters the backward pass with weight 1 / n, and the processes' gradients
    are summed once, after the last micro-batch. For `Weighted` losses of several processes or micro-batches the divisor
    is known only when all have been seen: the gradients are then multiplied by n / (sum of weights), before clipping.
    The recipe's Python runs exactly once per micro-batch.
    """

    _scale = 1.0  # of the weights: gradients are summed over the processes, not averaged
    compiled = Uncompiled()  # the trainer sets these
    recheck = NoRecheck()
    is_channels_last = False

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
        self.networks = networks
        self.optimizers = optimizers
        self.clip_norm = recipe.clip_norm
        self.objectives = recipe.objectives()
        for name in self.objectives:
            if name not in networks:
                raise UserError(
                    f"recipe {recipe.name}: objective {name!r} has no network of that name; "
                    f"networks() returns {', '.join(networks)}"
                )
        self.wrapped = {name: self._wrap(network) for name, network in networks.items()}
        self.gradient_sync = {name: GradientSync(network, runtime) for name, network in networks.items()}
        self.buffer_sync = BufferSync(networks, runtime)
        self.timing = Timing(runtime.device)
        self._gradients_first = closures_after_backward(recipe, optimizers)
        self._with_closure = {name for name, optimizer in optimizers.items() if needs_closure(optimizer)}
        self._with_closure |= self._gradients_first
        if self._with_closure and runtime.scaler is not None:
            raise UserError("--precision fp16: does not support optimizers that need a closure; use bf16 or fp32")
        self._zero_grads = {name: o.zero_grad for name, o in optimizers.items() if has_own_zero_grad(o)}
        self.norms: dict[str, Tensor] = {}  # of the last step's gradients before clipping, if they are clipped
        self._sums_in_passes = any(is_global(m) for network in networks.values() for m in network.modules())
        self._weights: dict[tuple[torch.Size, torch.dtype, int], Tensor] = {}
        self._forms = Forms()
        self._agreed: set[str] = set()  # objectives whose losses have the same form on all processes

    def __call__(self, batch: GlobalBatch, due: Collection[str] | None = None) -> Losses:
        """Takes one optimizer step of every objective, or of those that are `due`; returns their losses.

        Raises ShortOfMemory, on all processes that can tell each other, if a forward or backward pass of one runs out
        of memory.
        """
        losses: Losses = {}
        prepared: Prepared = []
        for name in self._due(due):
            if name in self._with_closure:
                losses[name] = self._step_with_closure(name, batch, prepared)
                continue
            self._begin_passes(name)
            losses[name] = self._gradients(name, batch, prepared, final=bool(losses))
            self._update(name)
        if self.runtime.scaler is not None:
            self.runtime.scaler.update()
        self.buffer_sync(sum(micro.size for micro in batch.micro_batches), batch.size)
        return losses

    @contextlib.contextmanager
    def watched(self, wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
        """Context manager: calls what `wrap` makes of each objective, from its name and itself."""
        originals = dict(self.objectives)
        self.objectives.update({name: wrap(name, objective) for name, objective in originals.items()})
        try:
            yield
        finally:
            self.objectives.update(originals)

    def _gradients(self, name: str, batch: GlobalBatch, prepared: Prepared, *, final: bool) -> list[Tensor | Weighted]:
        """Computes the clipped gradient of the mean loss over the global batch; returns this process's losses.

        prepared: the micro-batches' inputs, which the first objective prepares for all. final: whether a network has
        already been updated, so that the step can't be retried if memory is short.
        """
        losses: list[Tensor | Weighted] = []
        with self._shortage(name, batch.size) as shortage, self.recheck.of(name, batch):
            for number, micro in enumerate(batch.micro_batches):
                if number == len(prepared):
                    self.timing.enter("data")
                    prepared.append((self.inputs(batch, micro), micro))
                self.timing.enter("passes")
                with self._synchronised(name, number + 1 == len(batch.micro_batches)):
                    losses.append(self._forward_backward(name, prepared[number][0], micro, batch.size))
        self.timing.enter("sum")
        self._sum_over_processes(name, shortage.reason, final)
        self.recheck.compare()
        self.timing.enter("update")
        self._agree_on_form(name)
        self._weigh(name, losses, batch.size)
        if self.runtime.scaler is not None:
            self.runtime.scaler.unscale_(self.optimizers[name])
        self.recipe.before_update(name, self.networks[name])
        if self.clip_norm is not None:
            self.norms[name] = self._clip(self._with_gradients(name), self.clip_norm)
        return losses

    def _forward_backward(self, name: str, inputs: Batch, micro: MicroBatch, size: int) -> Tensor | Weighted:
        """Adds the gradients of a micro-batch to those of the network's parameters; returns its losses."""
        Sums.leave_out = micro.size < 1
        try:
            with self.compiled.calls():
                return self._passes(name, inputs, micro, size)
        finally:
            Sums.leave_out = False

    def _passes(self, name: str, inputs: Batch, micro: MicroBatch, size: int) -> Tensor | Weighted:
        with self.runtime.autocast():
            given = self.objectives[name](self._networks(name), inputs)
        loss = self._checked(name, given, max(1, micro.size), partial(tensors_of, inputs))
        self._forms.check(name, f"objective {name!r}", given)
        self.recheck.add(given)
        if isinstance(given, Weighted):
            if given.weights.requires_grad:
                raise UserError(
                    f"objective {name!r}: the weights of its Weighted losses need a gradient, which they get none of; "
                    "multiply the values by them and give constant weights, or detach them"
                )
            if self._is_whole(micro, size):
                total = given.weights.to(loss.dtype).sum()
                weights = given.weights.to(loss.dtype) * torch.where(total > 0, 1 / total, 0.0)
            else:
                weights = given.weights.to(loss.dtype) * (self._scale / size if micro.size else 0.0)
        else:
            weights = self._example_weights(loss, micro.size, size)
        if self.runtime.scaler is not None:
            weights = self.runtime.scaler.scale(weights)
        # the other networks' parameters get no gradients, frozen or not
        own = self._parameters(name) if len(self.networks) > 1 else []
        if own or len(self.networks) == 1 or self.gradient_sync[name].trusted:  # an empty list would mean all networks'
            backward(loss, weights, own)
        if isinstance(given, Weighted):
            return Weighted(*(tensor[: micro.size] for tensor in given.per_example()))
        return per_example(loss.detach()[: micro.size])

    def _is_whole(self, micro: MicroBatch, size: int) -> bool:
        """Whether a micro-batch is the whole global batch, so that the sum of its weights is known in time."""
        return self.runtime.world_size == 1 and micro.size == size

    def _sum_over_processes(self, name: str, short: str, final: bool) -> None:
        """All-reduces the gradients; raises ShortOfMemory on all processes if one ran out of memory in its passes.

        short: why this one did, or "". final: as in ShortOfMemory.
        """
        if short:
            self._clear(name)
            self._check_others_can_be_told(short)
        if self.gradient_sync[name](short=bool(short)) or short:
            self._clear(name)
            reasons = self.runtime.gather_objects(short)
            rank = next(rank for rank, reason in enumerate(reasons) if reason)
            raise ShortOfMemory(reasons[rank], final, rank)

    def _agree_on_form(self, name: str) -> None:
        """Raises UserError, on all processes, if the losses differ in form; a collective in the first step only.

        Afterwards a process whose losses take another form raises by itself.
        """
        if name not in self._agreed:
            self._agreed.add(name)
            own = {name: self._forms.by_name[name]}
            self._forms.check_others(self.runtime.gather_objects(own), "objective")

    def _weigh(self, name: str, losses: list[Tensor | Weighted], size: int) -> None:
        """Rescales the gradients of `Weighted` losses to those of the weighted mean over all processes."""
        if self.runtime.world_size == 1 and len(losses) == 1:
            return  # they are: see `_passes`
        weights = [loss.weights.sum() for loss in losses if isinstance(loss, Weighted)]
        if weights:
            total = self.runtime.sum(torch.stack(weights).sum())
            factor = torch.where(total > 0, size / total, 0.0)
            for gradient in (local(p.grad) for p in self._with_gradients(name)):
                gradient.mul_(factor.to(gradient.real.dtype if gradient.is_complex() else gradient.dtype))

    def _update(self, name: str) -> None:
        """Takes a step of one network's optimizer and drops its gradients."""
        try:
            if self.runtime.scaler is None:
                plain_step(self.optimizers[name])
            else:
                self.runtime.scaler.step(self.optimizers[name])
        except (AssertionError, TypeError, ValueError, RuntimeError) as error:
            if is_for_want_of_closure(self.optimizers[name], error):
                raise UserError(
                    f"the optimizer of {name!r}, {type(self.optimizers[name]).__name__}, needs a closure: if it starts "
                    f"from the gradients of loss.backward(), as SAM does, write closure_after_backward = ({name!r},) "
                    "in the recipe's class; else let its step(self, closure) have no default"
                ) from error
            raise
        self._clear(name)

    def _due(self, due: Collection[str] | None) -> list[str]:
        """The objectives of this step, in order; raises UserError for an unknown one."""
        if due is not None and (unknown := set(due) - self.objectives.keys()):
            raise UserError(
                f"recipe {self.recipe.name}: objectives_of_step() names {min(unknown)!r}; "
                f"objectives() returns {', '.join(self.objectives)}"
            )
        return [name for name in self.objectives if due is None or name in due]

    @contextlib.contextmanager
    def _shortage(self, name: str, size: int) -> Iterator[Shortage]:
        """Context manager: notes a lack of memory instead of raising; gives some errors of the passes a remedy."""
        shortage = Shortage()
        try:
            yield shortage
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"a batch of {size} examples leaves BatchNorm a single one to take statistics of; --drop-last "
                "leaves a small last batch out, a different --batch-size or a smaller --accumulate makes it larger"
            ) from error
        except (RuntimeError, MemoryError) as error:
            if len(self.networks) > 1 and "use_reentrant=True" in str(error):
                raise UserError(
                    f"objective {name!r}: torch.utils.checkpoint with use_reentrant=True gives gradients to every "
                    "network, and each objective trains its own; use use_reentrant=False"
                ) from error
            if "view size is not compatible" in str(error) and self.is_channels_last:
                raise UserError(
                    f"objective {name!r}: view() fails on an image tensor in channels-last layout"
                    f"{place_of(error)}; use reshape() or flatten(), or give --channels-last off"
                ) from error
            if not out_of_memory(error):
                raise
            shortage.reason = first_line(error)  # not the error, whose frames hold the memory

    def notes(self) -> list[str]:
        """What the plan says of optimizers whose closure may not be used as they need it."""
        return [
            f"{type(optimizer).__name__}.step(closure) finds no gradients when it begins; if it starts from those of "
            f"loss.backward(), as SAM does, write closure_after_backward = ({name!r},) in the recipe's class"
            for name, optimizer in self.optimizers.items()
            if name not in self._gradients_first and may_start_from_gradients(optimizer)
        ]

    def warm_up(self, give_batch: Callable[[], GlobalBatch]) -> None:
        """Prepares the first step of a launch; does nothing here."""

    def free(self) -> None:
        """Drops what is kept for speed only; micro-batches of a different size follow."""
        self._weights.clear()

    def inputs(self, batch: GlobalBatch, micro: MicroBatch) -> Batch:
        """A micro-batch as the networks get it: prepared and, if the recipe does so, augmented."""
        prepared = self.prepare(micro.raw)
        if self.augment is None:
            return prepared
        device = self.runtime.device
        numbers, times = micro.numbers.to(device), None if micro.times is None else micro.times.to(device)
        return self.augment(prepared, ExampleRandom(self.seed, batch.epoch, numbers, times=times))

    def _wrap(self, network: nn.Module) -> nn.Module:
        """The network as the backward pass needs it, with the weights of the first process."""
        self.runtime.broadcast_network(network)
        return self.runtime.wrap(network, ddp=False)

    def _networks(self, name: str) -> Networks:
        """The networks for one objective."""
        return self.networks if self.recheck.is_redoing else self.wrapped

    def _with_gradients(self, name: str) -> list[nn.Parameter]:
        return [parameter for parameter in self.networks[name].parameters() if parameter.grad is not None]

    def _parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters that the objective trains now: freezing may change from step to step."""
        return [parameter for parameter in self.networks[name].parameters() if parameter.requires_grad]

    def _check_others_can_be_told(self, short: str) -> None:
        """Raises a final ShortOfMemory if the other processes are waiting in their passes."""
        if self.runtime.world_size > 1 and (self._sums_in_passes or self.runtime.device.type != "cpu"):
            raise ShortOfMemory(short, True, self.runtime.rank)

    def _begin_passes(self, name: str) -> None:
        """Calls an optimizer's own `zero_grad`, which may count steps; that of torch has nothing to do here."""
        if name in self._zero_grads:
            self._zero_grads[name]()

    def _clear(self, name: str) -> None:
        for parameter in self.networks[name].parameters():
            parameter.grad = None

    def _step_with_closure(self, name: str, batch: GlobalBatch, prepared: Prepared) -> list[Tensor | Weighted]:
        """Takes a step of an optimizer that needs a closure, such as LBFGS; returns the first losses.

        The closure returns the global batch's mean loss each time, identical on all processes. With the recipe's
        `closure_after_backward` gradients are computed before the step, too.
        """
        first: list[list[Tensor | Weighted]] = []

        def closure() -> Tensor:
            self._clear(name)
            self._begin_passes(name)
            with torch.enable_grad():
                losses = self._gradients(name, batch, prepared, final=False)
            first.append(losses)
            return self._mean(losses, batch.size)

        try:
            if name in self._gradients_first:
                closure()
            self.optimizers[name].step(closure)  # type: ignore[arg-type]
        except ShortOfMemory as short:
            raise ShortOfMemory(str(short), True, short.rank) from short
        self._clear(name)
        if not first:
            raise UserError(f"the optimizer of {name!r} takes a closure and never calls it")
        return first[0]

    def _mean(self, losses: list[Tensor | Weighted], size: int) -> Tensor:
        """The mean loss over the global batch, identical on all processes."""
        sums = [x.values.sum() if isinstance(x, Weighted) else x.sum() for x in losses]
        weights = [x.weights.sum() for x in losses if isinstance(x, Weighted)]
        total = self.runtime.sum(torch.stack([*sums]).sum().reshape(1))
        divisor = self.runtime.sum(torch.stack(weights).sum().reshape(1)) if weights else size
        return (total / divisor).squeeze(0)

    def _clip(self, parameters: list[nn.Parameter], clip_norm: float) -> Tensor:
        """Scales the gradients down to `clip_norm` if their norm is larger; returns their norm before."""
        return nn.utils.clip_grad_norm_(parameters, clip_norm)

    def _checked(self, name: str, given: Any, num_examples: int, tensors: Callable[[], Iterable[Tensor]]) -> Tensor:
        """The losses that an objective returned; raises UserError if they are invalid."""
        loss = checked(given, num_examples, f"objective {name!r}", "loss", tensors)
        if not loss.is_floating_point():
            raise UserError(
                f"objective {name!r}: returns losses of type {str(loss.dtype).removeprefix('torch.')}, through which "
                "no gradient flows; compute them from the network's output in floating point"
            )
        if not loss.requires_grad:
            raise UserError(
                f"objective {name!r}: its loss depends on no trainable parameter: it is detached (.detach(), "
                ".item(), torch.no_grad()), or every parameter is frozen"
            )
        return loss

    def _example_weights(self, loss: Tensor, counted: int, size: int) -> Tensor:
        """The weight of each loss in the backward pass, shape of `loss`: 1 / n, or 0 for padding."""
        key = (loss.shape, loss.dtype, size if counted else 0)
        if key not in self._weights:
            if len(self._weights) > 64:  # lengths that vary from batch to batch
                self._weights.clear()
            per_example = loss.numel() // len(loss)
            weight = self._scale / (size * per_example) if counted else 0.0
            self._weights[key] = torch.full_like(loss, weight, memory_format=torch.contiguous_format).detach()
        return self._weights[key]

    def _synchronised(self, name: str, last: bool) -> contextlib.AbstractContextManager[None]:
        """Context manager around the passes over a micro-batch."""
        return contextlib.nullcontext()
