"""One optimizer step: forward, backward and update of each objective in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .blocks import local
from .checkpoint import check_tensors, network_tensors
from .data import Data, ExampleRandom, GlobalBatch, MicroBatch
from .errors import UserError
from .metrics import Weighted
from .optimizers import bare_step
from .recipe import Batch, Recipe
from .runtime import GlobalBatchNorm, Runtime

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
        """Takes one optimizer step of every objective; returns the unscaled losses that it was taken on."""
        prepared = [(self.inputs(batch, micro), micro) for micro in batch.micro_batches]
        losses: Losses = {}
        for name in self.objectives:
            losses[name] = self._gradients(name, prepared, batch.size)
            self._average(name)
            self._update(name, losses[name], batch.size)
        if self.runtime.scaler is not None:
            self.runtime.scaler.update()
        return losses

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
        buffers = [buffer for network in self.networks.values() for buffer in network.buffers()]
        kept = [buffer.clone() for buffer in buffers]
        micro = batch.micro_batches[0]
        for name in self.objectives:
            with self._only(name) as networks:
                self._backward(name, networks, self.inputs(batch, micro), micro, batch.size)
            for parameter in self.parameters[name]:
                parameter.grad = None
        with torch.no_grad():
            for buffer, value in zip(buffers, kept, strict=True):
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


class NoAverage:
    """Stands where no moving average is kept."""

    def update(self, step: int) -> None:
        """Nothing."""

    def applied(self) -> contextlib.AbstractContextManager[None]:
        """The networks stay as they are."""
        return contextlib.nullcontext()

    def state(self) -> dict[str, dict[str, Tensor]] | None:
        """None: there is no average."""
        return None

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing."""

    def begin(self) -> None:
        """Nothing."""


class MovingAverage(NoAverage):
    """An exponential moving average of the networks' parameters, with their latest buffers; split as they are.

    After every step: average = decay * average + (1 - decay) * parameter. In the first steps the decay is
    (1 + step) / (10 + step) where that is less, so that the initial weights are soon forgotten (as TensorFlow does).
    """

    def __init__(self, networks: Mapping[str, nn.Module], decay: float):
        self.networks = networks
        self.decay = decay
        self.average = {
            name: {key: value.detach().clone() for key, value in network.state_dict().items()}
            for name, network in networks.items()
        }
        pairs = [
            (self.average[name][key], parameter)
            for name, network in networks.items()
            for key, parameter in network.named_parameters(remove_duplicate=False)  # tied weights have two names
        ]
        self._averages: list[Tensor] = [local(average) for average, _ in pairs]
        self._parameters: list[Tensor] = [local(parameter) for _, parameter in pairs]

    @torch.no_grad()
    def begin(self) -> None:
        """Starts from the present weights."""
        torch._foreach_copy_(self._averages, self._parameters)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after optimizer step `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._parameters, 1 - decay)

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Within it the networks have the averaged parameters."""
        kept = [parameter.detach().clone() for parameter in self._parameters]
        self._refresh_buffers()
        torch._foreach_copy_(self._parameters, self._averages)
        try:
            yield
        finally:
            torch._foreach_copy_(self._parameters, kept)

    def state(self) -> dict[str, dict[str, Tensor]] | None:
        """Network name -> the averaged state, as in its state_dict."""
        self._refresh_buffers()
        return self.average

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `checkpoint.network_tensors` made of `state`; raises DamagedCheckpoint where it differs."""
        own = network_tensors(self.average)
        check_tensors(own, tensors, "ema.safetensors")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def _refresh_buffers(self) -> None:
        for name, network in self.networks.items():
            for key, value in network.named_buffers():
                if key in self.average[name]:
                    self.average[name][key].copy_(value)
