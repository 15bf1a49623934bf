"""One optimizer step under observation: its examples, losses, gradients, activations, and what was not finite first.

The step takes the same operations with the same bits as without being observed.
"""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..data.feed import GlobalBatch, MicroBatch
from ..distributed.blocks import local
from ..metrics import Weighted, summable
from ..recipe.contract import Recipe
from ..training.step import Losses
from ..training.trainer import Trainer

PACKAGE = str(Path(__file__).parent.parent)
MASKS = ("masked_fill", "full", "fill", "where", "scalar_tensor", "empty", "ones", "zeros", "neg")
"""Operations that make infinities on purpose, as attention's masks do."""


@dataclass
class NotFinite:
    """The first result that was not finite. kind: "nan" or "inf". module: the innermost one, "" for none.

    where: the line of the user's code, "" in a backward pass. operation: torch's name. passes: "forward" or "backward".
    """

    kind: str
    operation: str
    module: str
    where: str
    passes: str

    def __str__(self) -> str:
        what = "a number too large" if self.kind == "inf" else "not a number"
        of = f" of {self.module}" if self.module else ""
        return f"{what}, from {self.operation} in the {self.passes} pass{of}{f', {self.where}' if self.where else ''}"


@dataclass
class Layer:
    """A parameter: norms of its gradient (before clipping), of its change in the step, and of itself before it.

    Under --shard fsdp they are those of the main process's shards.
    """

    name: str
    gradient: float
    update: float
    weight: float


@dataclass
class Activation:
    """The outputs of a module in the forward passes of this process: extremes, and how many were not finite."""

    name: str
    least: float = math.inf
    largest: float = -math.inf
    not_finite: int = 0

    def add(self, output: Tensor) -> None:
        finite = output.isfinite()
        self.not_finite += int((~finite).sum())
        kept = output[finite]
        if kept.numel():
            self.least = min(self.least, float(kept.min()))
            self.largest = max(self.largest, float(kept.max()))


@dataclass
class Examined:
    """The step. examples: their numbers, int64 [n]. losses: by objective, float64 [n]; nan where there is none.

    inputs: the first micro-batch of this process, as the networks got it.
    """

    step: int
    examples: list[int] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    activations: list[Activation] = field(default_factory=list)
    first: NotFinite | None = None
    inputs: Any = None


class Watching(TorchDispatchMode):
    """Looks at the result of every operation until one is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.nan: NotFinite | None = None
        self.inf: NotFinite | None = None
        self.module = ""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        if self.nan is None:
            self._look(function, result)
        return result

    def _look(self, function: Any, result: Any) -> None:
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            name = str(function).removeprefix("aten.").split(".")[0].rstrip("_")
            plain = local(tensor.detach())
            if plain.is_meta or not plain.numel() or name.startswith("empty") or bool(plain.isfinite().all()):
                continue
            is_nan = bool(plain.isnan().any())
            if is_nan:
                self.nan = self._found("nan", name)
                return
            if self.inf is None and not name.startswith(MASKS):
                self.inf = self._found("inf", name)

    def _found(self, kind: str, name: str) -> NotFinite:
        module, where = place_of(self.module)
        passes = "forward" if where else "backward"
        return NotFinite(kind, name, module, where, passes)


def place_of(module: str) -> tuple[str, str]:
    """The module and the line of the recipe's code that are being computed, such as "net.py, line 12, in forward".

    The line is "" in a backward pass, whose operations no line of Python asks for one by one, and both are "" in the
    optimizer. module: that which was entered last.
    """
    frames = traceback.extract_stack()
    step = [n for n, f in enumerate(frames) if f.filename.endswith("step.py") and f.name == "_forward_backward"]
    if not step:
        return "", ""
    inside = frames[step[-1] + 1 :]
    if any(frame.name in ("backward", "run_backward") for frame in inside):
        return module, ""
    own = [f for f in inside if not f.filename.startswith(PACKAGE) and "site-packages" not in f.filename]
    return module, f"{own[-1].filename}, line {own[-1].lineno}, in {own[-1].name}" if own else ""


class _BeforeUpdate:
    """The recipe, with its gradients looked at before they are clipped."""

    def __init__(self, recipe: Recipe, gradients: dict[str, float]):
        self._recipe, self._gradients = recipe, gradients

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recipe, name)

    def before_update(self, name: str, network: nn.Module) -> None:
        self._recipe.before_update(name, network)
        for key, parameter in network.named_parameters():
            if parameter.grad is not None:
                self._gradients[f"{name}.{key}"] = _norm(parameter.grad)


def _norm(tensor: Tensor) -> float:
    plain = summable(local(tensor.detach()))
    return float((plain.abs() if plain.is_complex() else plain).double().norm())


class Examination:
    """Takes a step as `Replay.advance` asks it to; `found` is what happened in it."""

    def __init__(self) -> None:
        self.found = Examined(0)

    def __call__(self, trainer: Trainer, batch: GlobalBatch, due: Any) -> Losses:
        found = self.found = Examined(trainer.step + 1)
        step = trainer.optimizer_step._step  # type: ignore[attr-defined]
        named = [(f"{n}.{key}", p) for n, net in trainer.networks.items() for key, p in net.named_parameters()]
        before = {name: local(parameter.detach()).clone() for name, parameter in named}
        gradients: dict[str, float] = {}
        kept: list[Any] = []
        inputs, recipe, watching = step.inputs, step.recipe, Watching()

        def keep_inputs(of: GlobalBatch, micro: MicroBatch) -> Any:
            kept.append(inputs(of, micro))
            return kept[-1]

        with _observed(trainer.networks, watching) as activations:
            step.inputs, step.recipe = keep_inputs, _BeforeUpdate(recipe, gradients)
            try:
                with watching:
                    losses: Losses = step(batch, due)
            finally:
                del step.inputs
                step.recipe = recipe
        found.activations = [a for a in activations.values() if a.largest >= a.least or a.not_finite]
        found.layers = [
            Layer(
                name,
                gradients.get(name, 0.0),
                _norm(local(parameter.detach()) - before[name]),
                _norm(before[name]),
            )
            for name, parameter in named
        ]
        found.inputs = kept[0] if kept else None
        self._of_all(trainer, batch, losses, watching)
        return losses

    def _of_all(self, trainer: Trainer, batch: GlobalBatch, losses: Losses, watching: Watching) -> None:
        """What the other processes saw: their examples and losses, and who met the first that was not finite."""
        runtime, found = trainer.runtime, self.found
        numbers = torch.cat([micro.numbers[: micro.size].cpu() for micro in batch.micro_batches])
        # one process has nothing to send: its device may have no float64
        device = runtime.device if runtime.world_size > 1 else torch.device("cpu")
        found.examples = runtime.gather_rows(trainer.feed.examples.named(numbers).to(device)).tolist()
        for name, given in losses.items():
            mine = torch.cat([_means(one) for one in given])
            found.losses[name] = runtime.gather_rows(mine.to(device)).tolist()
        met = watching.nan or watching.inf
        places = runtime.gather_objects(vars(met) if met is not None else None)
        kinds = [NotFinite(**place) for place in places if place is not None]
        found.first = next((one for one in kinds if one.kind == "nan"), next(iter(kinds), None))


def _means(losses: Tensor | Weighted) -> Tensor:
    """One loss per example, float64."""
    if isinstance(losses, Weighted):
        return (losses.values / losses.weights).cpu().double()
    return losses.detach().cpu().double()


@contextlib.contextmanager
def module_names(networks: Any, watching: Any, leave: Any = None) -> Iterator[None]:
    """Context manager: `watching.module` is the innermost module without modules in it that is being called.

    In a backward pass it is the module whose gradients are being computed, "" between modules.

    leave: called with a module's name and its output.
    """
    handles: list[Any] = []
    backward = _BackwardNames(watching)
    for network_name, network in networks.items():
        for name, module in network.named_modules():
            if any(True for _ in module.children()):
                continue
            full = f"{network_name}.{name}" if name else network_name

            def entered(_: nn.Module, inputs: Any, full: str = full) -> None:
                watching.module = full
                backward.name(inputs, "")

            def left(_: nn.Module, __: Any, output: Any, full: str = full) -> None:
                watching.module = ""
                backward.name(output, full)
                if leave is not None:
                    leave(full, output)

            handles += [module.register_forward_pre_hook(entered), module.register_forward_hook(left)]
    try:
        yield
    finally:
        watching.module = ""
        for handle in [*handles, *backward.handles]:
            handle.remove()


class _BackwardNames:
    """Sets `watching.module` in a backward pass: from the node that made a module's output to those of its inputs."""

    def __init__(self, watching: Any):
        self.watching = watching
        self.handles: list[Any] = []
        self._named: set[Any] = set()

    def name(self, tensors: Any, module: str) -> None:
        """From the nodes that made these tensors on, it is this module's backward pass; one keeps its first name."""
        for tensor in tensors if isinstance(tensors, tuple | list) else (tensors,):
            node = tensor.grad_fn if isinstance(tensor, Tensor) else None
            if node is None or node in self._named:
                continue
            self._named.add(node)

            def entered(_: Any, module: str = module) -> None:
                self.watching.module = module

            self.handles.append(node.register_prehook(entered))


@contextlib.contextmanager
def _observed(networks: Any, watching: Watching) -> Iterator[dict[str, Activation]]:
    """Context manager: the range of the outputs of every module without modules in it, by name."""
    found: dict[str, Activation] = {}

    def leave(name: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor) and first.is_floating_point() and torch.is_grad_enabled():
            with torch.no_grad(), _unwatched(watching):
                found.setdefault(name, Activation(name)).add(local(first.detach()))

    with module_names(networks, watching, leave):
        yield found


@contextlib.contextmanager
def _unwatched(watching: Watching) -> Iterator[None]:
    nan, watching.nan = watching.nan, watching.nan or NotFinite("", "", "", "", "")
    try:
        yield
    finally:
        watching.nan = nan
