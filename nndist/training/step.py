"""One optimizer step: forward, backward, sum over the processes and update of each objective in turn."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..data.feed import GlobalBatch, MicroBatch
from ..data.sets import Data, ExampleRandom
from ..distributed.batch_norm import GlobalBatchNorm
from ..distributed.blocks import local, whole_tensor
from ..distributed.runtime import Runtime
from ..distributed.sync import BufferSync, GradientSync
from ..errors import ShortOfMemory, UserError, first_line, out_of_memory
from ..metrics import Weighted
from ..recipe.contract import Batch, Networks, Recipe
from ..runs.optimizer_state import repeatable
from .optimizers import needs_closure, plain_step

Losses = dict[str, list[Tensor | Weighted]]
"""Objective name -> this process's per-example losses, one tensor per micro-batch, without padding."""
Prepared = list[tuple[Batch, MicroBatch]]


class Step:
    """Takes optimizer steps as a loop written by hand does, operation by operation.

    The gradient is that of the mean loss over the global batch, whatever the number of processes and micro-batches:
    with n examples in all, each example's loss enters the backward pass with weight 1 / n, and the processes' gradients
    are added up once, after the last micro-batch. Of `Weighted` losses the divisor is known only when all processes
    have seen all their micro-batches: the gradients are then multiplied by n / (sum of weights), before they are
    clipped. The recipe's Python runs once per micro-batch and never besides.
    """

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
                    f"networks() gives {', '.join(networks)}"
                )
        self.wrapped = {name: self._wrap(network) for name, network in networks.items()}
        self.gradient_sync = {name: GradientSync(network, runtime) for name, network in networks.items()}
        self.buffer_sync = BufferSync(networks, runtime)
        self._with_closure = {name for name, optimizer in optimizers.items() if needs_closure(optimizer)}
        if self._with_closure and runtime.scaler is not None:
            raise UserError("--precision fp16: does not support optimizers that need a closure; use bf16 or fp32")
        self.norms: dict[str, Tensor] = {}  # of the last step's gradients before clipping, where there is clipping
        self._batch_norms = [m for n in networks.values() for m in n.modules() if isinstance(m, GlobalBatchNorm)]
        self._weights: dict[tuple[torch.Size, torch.dtype, int], Tensor] = {}

    def __call__(self, batch: GlobalBatch, due: Collection[str] | None = None) -> Losses:
        """Takes one optimizer step of every objective, or of those that are `due`; returns the losses it was taken on.

        Raises ShortOfMemory, on all processes that can tell each other, where a forward or backward pass of one is.
        """
        losses: Losses = {}
        prepared: Prepared = []
        if due is not None and (unknown := set(due) - self.objectives.keys()):
            raise UserError(
                f"recipe {self.recipe.name}: objectives_of_step() names {min(unknown)!r}; "
                f"objectives() gives {', '.join(self.objectives)}"
            )
        for name in self.objectives:
            if due is not None and name not in due:
                continue
            if name in self._with_closure:
                losses[name] = self._step_with_closure(name, batch, prepared)
                continue
            losses[name] = self._gradients(name, batch, prepared, updated=losses)
            self._finish_gradients(name, losses[name], batch.size)
            self._update(name)
        if self.runtime.scaler is not None:
            self.runtime.scaler.update()
        self.buffer_sync(sum(micro.size for micro in batch.micro_batches), batch.size)
        return losses

    def rehearse(self, give_batch: Callable[[], GlobalBatch]) -> None:
        """Nothing: gradients are summed in one order, from the first step on."""

    def free(self) -> None:
        """Lets go of what is kept for speed only; other micro-batches are to come."""
        self._weights.clear()

    def inputs(self, batch: GlobalBatch, micro: MicroBatch) -> Batch:
        """A micro-batch as the networks get it: prepared and, where the recipe says so, augmented."""
        prepared = self.prepare(micro.raw)
        if self.augment is None:
            return prepared
        numbers = micro.numbers.to(self.runtime.device)
        return self.augment(prepared, ExampleRandom(self.seed, batch.epoch, numbers))

    def _wrap(self, network: nn.Module) -> nn.Module:
        """The network as the backward pass needs it, with the weights of the first process."""
        self.runtime.broadcast_network(network)
        return self.runtime.wrap(network, ddp=False)

    def _networks(self, name: str) -> Networks:
        """The networks for one objective."""
        return self.wrapped

    def _with_gradients(self, name: str) -> list[nn.Parameter]:
        return [parameter for parameter in self.networks[name].parameters() if parameter.grad is not None]

    def _parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters that the objective trains now: what is frozen may change from step to step."""
        return [parameter for parameter in self.networks[name].parameters() if parameter.requires_grad]

    def _gradients(self, name: str, batch: GlobalBatch, prepared: Prepared, updated: Losses) -> list[Tensor | Weighted]:
        """Forward and backward over the micro-batches, then the sum over the processes; returns their losses.

        prepared: the micro-batches' inputs, which the first objective prepares for all.
        """
        losses: list[Tensor | Weighted] = []
        short = ""
        try:
            for number, micro in enumerate(batch.micro_batches):
                if number == len(prepared):
                    prepared.append((self.inputs(batch, micro), micro))
                with self._synchronised(name, number + 1 == len(batch.micro_batches)):
                    losses.append(self._backward(name, prepared[number][0], micro, batch.size))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"a batch of {batch.size} examples gives BatchNorm a single one to take statistics of; --drop-last "
                "leaves a small last batch out, another --batch-size or a smaller --accumulate makes it larger"
            ) from error
        except (RuntimeError, MemoryError) as error:
            if len(self.networks) > 1 and "use_reentrant=True" in str(error):
                raise UserError(
                    f"objective {name!r}: torch.utils.checkpoint with use_reentrant=True gives gradients to every "
                    "network, and each objective trains its own; use use_reentrant=False"
                ) from error
            if not out_of_memory(error):
                raise
            short = first_line(error)
        # only here are the error and its frames gone, which hold the memory
        if short:
            self._clear(name)
            self._check_others_can_be_told(short)
        if self.gradient_sync[name](short=bool(short)) or short:
            self._clear(name)
            whose, why = next((r, s) for r, s in enumerate(self.runtime.gather_objects(short)) if s)
            raise ShortOfMemory(why, bool(updated), whose)
        return losses

    def _check_others_can_be_told(self, short: str) -> None:
        """Raises ShortOfMemory for good where the other processes are waiting within their passes."""
        if self.runtime.world_size > 1 and (self._batch_norms or self.runtime.device.type != "cpu"):
            raise ShortOfMemory(short, True, self.runtime.rank)

    def _clear(self, name: str) -> None:
        for parameter in self.networks[name].parameters():
            parameter.grad = None

    def _finish_gradients(self, name: str, losses: list[Tensor | Weighted], size: int) -> None:
        """Makes the gradients those of the mean over what weighs, unscaled, and clips them."""
        weights = [loss.weights.sum() for loss in losses if isinstance(loss, Weighted)]
        if weights:
            total = self.runtime.sum(torch.stack(weights).sum())
            factor = torch.where(total > 0, size / total, 0.0)
            for gradient in (local(p.grad) for p in self._with_gradients(name)):
                gradient.mul_(factor.to(gradient.real.dtype if gradient.is_complex() else gradient.dtype))
        if self.runtime.scaler is not None:
            self.runtime.scaler.unscale_(self.optimizers[name])
        self.recipe.before_update(name, self.networks[name])
        if self.clip_norm is not None:
            self.norms[name] = self._clip(self._with_gradients(name), self.clip_norm)

    def _update(self, name: str) -> None:
        """One step of the optimizer of the network called `name`, from its gradients, which are used up."""
        if self.runtime.scaler is None:
            plain_step(self.optimizers[name])
        else:
            self.runtime.scaler.step(self.optimizers[name])
        self._clear(name)

    def _step_with_closure(self, name: str, batch: GlobalBatch, prepared: Prepared) -> list[Tensor | Weighted]:
        """A step of an optimizer that asks for losses and gradients itself, such as LBFGS; gives the first losses.

        Each time it is given those of the whole global batch, the same on all processes.
        """
        first: list[list[Tensor | Weighted]] = []

        def closure() -> Tensor:
            self._clear(name)
            with torch.enable_grad():
                losses = self._gradients(name, batch, prepared, updated={})
            self._finish_gradients(name, losses, batch.size)
            first.append(losses)
            return self._mean(losses, batch.size)

        try:
            self.optimizers[name].step(closure)  # type: ignore[arg-type]
        except ShortOfMemory as short:
            raise ShortOfMemory(str(short), True, short.rank) from short
        self._clear(name)
        if not first:
            raise UserError(f"the optimizer of {name!r} takes a closure and never calls it")
        return first[0]

    def _mean(self, losses: list[Tensor | Weighted], size: int) -> Tensor:
        """The mean loss over the global batch, a number that all processes have alike."""
        sums = [x.values.sum() if isinstance(x, Weighted) else x.sum() for x in losses]
        weights = [x.weights.sum() for x in losses if isinstance(x, Weighted)]
        total = self.runtime.sum(torch.stack([*sums]).sum().reshape(1))
        divisor = self.runtime.sum(torch.stack(weights).sum().reshape(1)) if weights else size
        return (total / divisor).squeeze(0)

    def _clip(self, parameters: list[nn.Parameter], clip_norm: float) -> Tensor:
        """Scales the gradients down to the norm where theirs is larger; gives what theirs was."""
        return nn.utils.clip_grad_norm_(parameters, clip_norm)

    def _backward(self, name: str, inputs: Batch, micro: MicroBatch, size: int) -> Tensor | Weighted:
        """Adds the gradients of a micro-batch to those of the network's parameters; returns its losses."""
        for module in self._batch_norms:
            module.padding = 1 - micro.size if micro.size < 1 else 0
        with self.runtime.autocast():
            given = self.objectives[name](self._networks(name), inputs)
        loss = self._checked(name, given, max(1, micro.size))
        if isinstance(given, Weighted):
            weights = given.weights.to(loss.dtype) * (self._scale / size if micro.size else 0.0)
        else:
            weights = self._example_weights(loss, micro.size, size)
        if self.runtime.scaler is not None:
            weights = self.runtime.scaler.scale(weights)
        # the other networks' parameters get no gradients, whoever has frozen or unfrozen them
        own = self._parameters(name) if len(self.networks) > 1 else []
        if own or len(self.networks) == 1 or self.gradient_sync[name].trusted:  # none of several would mean all
            backward(loss, weights, own)
        if isinstance(given, Weighted):
            return Weighted(*(tensor[: micro.size] for tensor in given.per_example()))
        losses = loss.detach()
        losses = losses[: micro.size] if micro.size < len(losses) else losses
        # one per example is kept
        return losses if losses.dim() == 1 else losses.flatten(1).double().mean(1)

    def _checked(self, name: str, given: Any, num_examples: int) -> Tensor:
        """The losses that an objective gave; raises UserError where they can't be meant."""
        loss = given.values if isinstance(given, Weighted) else given
        if not isinstance(loss, Tensor):
            raise UserError(
                f"objective {name!r}: gives a {type(loss).__name__}; it must give a tensor of one loss per example"
            )
        if loss.dim() == 0 or len(loss) != num_examples:
            raise UserError(
                f"objective {name!r}: gives a loss of shape {tuple(loss.shape)} for {num_examples} examples; "
                "it must give one loss per example (with reduction='none'), the loop takes the mean"
            )
        if isinstance(given, Weighted) and given.weights.shape != loss.shape:
            raise UserError(
                f"objective {name!r}: weights of shape {tuple(given.weights.shape)} for losses of shape "
                f"{tuple(loss.shape)}; they must have the same shape"
            )
        if not loss.is_floating_point():
            raise UserError(
                f"objective {name!r}: gives losses of type {str(loss.dtype).removeprefix('torch.')}, through which no "
                "gradient flows; compute them from the network's output in floating point"
            )
        if not loss.requires_grad:
            raise UserError(
                f"objective {name!r}: its loss depends on no parameter that is trained: it is detached (.detach(), "
                ".item(), torch.no_grad()), or every parameter is frozen"
            )
        return loss

    _scale = 1.0  # of the weights: what is summed over the processes is not divided by their number

    def _example_weights(self, loss: Tensor, counted: int, size: int) -> Tensor:
        """What each loss weighs in the backward pass, shape of `loss`: 1 / n, or 0 for padding."""
        key = (loss.shape, loss.dtype, size if counted else 0)
        if key not in self._weights:
            if len(self._weights) > 64:  # lengths that vary from batch to batch
                self._weights.clear()
            per_example = loss.numel() // len(loss)
            weight = self._scale / (size * per_example) if counted else 0.0
            self._weights[key] = torch.full_like(loss, weight, memory_format=torch.contiguous_format).detach()
        return self._weights[key]

    def _synchronised(self, name: str, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around the passes over a micro-batch."""
        return contextlib.nullcontext()


class DDPStep(Step):
    """Averages the gradients by torch's DistributedDataParallel, while the backward pass is still running.

    For networks whose gradients take long to send. It needs every parameter in every step, and calls of the network
    itself, not of its parts: so it is the choice of whoever starts the run.
    """

    def __init__(self, *arguments: Any):
        self._averaged: dict[str, set[int]] = {}
        super().__init__(*arguments)

    def _wrap(self, network: nn.Module) -> nn.Module:
        return self.runtime.wrap(network)

    @property
    def _scale(self) -> float:  # type: ignore[override]
        return float(self.runtime.world_size)  # DDP averages over the processes

    def _networks(self, name: str) -> Networks:
        return {**self.networks, name: self.wrapped[name]}

    def _gradients(self, name: str, batch: GlobalBatch, prepared: Prepared, updated: Losses) -> list[Tensor | Weighted]:
        self.gradient_sync[name].trusted = True  # DDP has done it
        now = {id(parameter) for parameter in self._parameters(name)}
        if self._averaged.setdefault(name, now) != now:
            raise UserError(
                f"--gradient-sync ddp: parameters of {name!r} were frozen or unfrozen after the start, and DDP would "
                "not average them; use --gradient-sync step"
            )
        return super()._gradients(name, batch, prepared, updated)

    def _check_others_can_be_told(self, short: str) -> None:
        if self.runtime.world_size > 1:
            raise ShortOfMemory(short, True, self.runtime.rank)

    def _synchronised(self, name: str, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are averaged over the processes with the last micro-batch only."""
        wrapped = self.wrapped[name]
        if last or not isinstance(wrapped, DistributedDataParallel):
            return contextlib.nullcontext()
        return wrapped.no_sync()

    def rehearse(self, give_batch: Callable[[], GlobalBatch]) -> None:
        """Takes the passes over some whole batch before the first step; every effect on tensors is undone.

        DDP lays its gradient buckets out anew after the first backward pass, and so sums in another order from then
        on: with three or more processes a run that is resumed would differ in bits from one that was not interrupted.
        """
        if self.runtime.world_size == 1:
            return
        batch = give_batch()
        undo = repeatable(self.networks, self.runtime.device)
        micro = batch.micro_batches[0]
        for name in self.objectives:
            self._backward(name, self.inputs(batch, micro), micro, batch.size)
            unused = [n for n, p in self.networks[name].named_parameters() if p.requires_grad and p.grad is None]
            if unused:
                raise UserError(
                    f"--gradient-sync ddp: {name}.{unused[0]} gets no gradient, and DDP waits for every parameter; "
                    "use --gradient-sync step"
                )
            for network in self.networks.values():
                for parameter in network.parameters():
                    parameter.grad = None
        undo()


class ShardedStep(Step):
    """The step over networks that are split over the processes (see fsdp.FullyShard).

    Gradients are summed and split block by block within the backward pass, of every micro-batch: to keep those of a
    whole network until the last one would take the memory that splitting saves.
    """

    def _wrap(self, network: nn.Module) -> nn.Module:
        # A block that gives views, as attention's keys are, is warned about: adding to one in place would go wrong
        warnings.filterwarnings("ignore", message=".*returned a view tensor")
        return self.runtime.wrap(network, ddp=False)

    @property
    def _scale(self) -> float:  # type: ignore[override]
        return float(self.runtime.world_size)  # it averages over the processes

    def _gradients(self, name: str, batch: GlobalBatch, prepared: Prepared, updated: Losses) -> list[Tensor | Weighted]:
        self.gradient_sync[name].trusted = True
        losses = super()._gradients(name, batch, prepared, updated)
        own = {id(parameter) for parameter in self.networks[name].parameters()}
        for parameter in (p for network in self.networks.values() for p in network.parameters()):
            if id(parameter) not in own:
                parameter.grad = None
        return losses

    def _parameters(self, name: str) -> list[nn.Parameter]:
        return []  # of all, since those that are gathered for a pass are other tensors

    def _check_others_can_be_told(self, short: str) -> None:
        raise ShortOfMemory(short, True, self.runtime.rank)

    def _clip(self, parameters: list[nn.Parameter], clip_norm: float) -> Tensor:
        found = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = whole_tensor(nn.utils.get_total_norm(found))
        factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        torch._foreach_mul_([local(gradient) for gradient in found], factor)
        return norm


def backward(loss: Tensor, weights: Tensor, parameters: Collection[Tensor] = ()) -> None:
    """`loss.backward(weights)` for shapes that are known to agree; the mean's own kernels are saved.

    parameters: those that gradients are added to, instead of all. torch checks the shapes by its symbolic ones, which
    takes 0.7 s to import and 30 us a step (measured on torch 2.14.1).
    """
    torch.autograd.Variable._execution_engine.run_backward(
        *((loss,), (weights,), False, False, tuple(parameters)), allow_unreachable=True, accumulate_grad=True
    )
