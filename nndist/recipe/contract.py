"""The contract of a recipe: what to train, and nothing about devices, processes, files, precision or tracking.

A recipe is a dataclass in its own module. The minimum:

    @dataclass(kw_only=True)
    class Sums(Recipe):
        epochs: int = 5                             # fields are flags: --epochs 5

        def data(self, config):
            x = torch.rand(1000, 4)                 # [examples, ...], on the CPU
            y = x.sum(1, keepdim=True)
            return Data(train=Resident(x[:800], y[:800]), test=Resident(x[800:], y[800:]))

        def networks(self):
            return {"model": nn.Linear(4, 1)}

        def optimizer(self, name, network):
            return torch.optim.SGD(network.parameters(), lr=self.lr)

        def loss(self, networks, batch):
            x, y = batch                            # [k, 4] and [k, 1], on the device
            return (networks["model"](x) - y).square().squeeze(1)                    # [k]

The loop calls in this order: `validate`; `data`, once on each process; `networks`, `initial_weights` and, for each
network, `optimizer`; `preview`, once; then in each step each of the `objectives`; in an evaluation `score` for each
batch, then `snapshot`; at the end `figures`. `predict` is called when the trained networks are used. --seed seeds the
random numbers that `data` and `networks` draw from torch.

A trained run is used without its training data. `networks` is called again then, `data` need not be: what `data` sets
on the recipe (`self.classes_of_mine = [...]`, a vocabulary, a `Scaling`) is stored in the run's folder and set before
`networks` is called. A file of weights is read in `initial_weights`, in training only.

A batch passes through three functions. `Streamed(decode=...)` turns one example as stored into tensors, in a worker
process. `Data(prepare=...)` turns a raw batch into the networks' input on the device, in training and wherever the
networks are used, and uses no randomness. `Data(augment=...)` changes a prepared training batch at random, in training
only. None of them deals with units: `scaling.Scaled` is a network that takes and returns values in measured units.

In shapes k is the number of examples of a batch, or of the part that one process holds: a method must not rely on a
size. `recipes/mnist_cnn.py` is a short recipe, `recipes/mnist_gan.py` one of two networks; `nndist new` writes one
to start from. Losses are per example because only then can a step be exact: with n examples in the global batch, its
loss is sum(losses) / n, whatever part each process holds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.optim import Optimizer

from ..directions import Direction, direction_of
from ..errors import UserError
from ..metrics import Output, Total, Weighted
from ..schedules import ScheduleName, lr_factor
from ..stores import plain_urls
from . import declaration, helpers
from .fields import Amount, Count, Share, check_best, check_fields, hints_of, to_json

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

    from ..data.config import DataConfig
    from ..data.sets import Data
    from ..prediction.inputs import Answers, Inputs
    from ..runs.tracking import History

Batch = Any
"""One (micro-)batch as `Data.prepare` returns it: a tuple of tensors of the same first dimension, or anything else."""
Networks = Mapping[str, nn.Module]
Activation = Literal["relu", "sigmoid", "tanh", "softplus"]
ACTIVATIONS: dict[str, nn.Module] = {
    "relu": nn.ReLU(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "softplus": nn.Softplus(),
}
"""The activation functions that small recipes offer (document 001, part 2)."""
Cell = Literal["rnn", "lstm", "gru", "rnn-relu"]
CELLS: dict[str, Any] = {
    "rnn": nn.RNN,
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn-relu": partial(nn.RNN, nonlinearity="relu"),
}
"""The recurrent layers that recipes offer: plain (tanh), LSTM, GRU, or plain with ReLU (document 002, section 4)."""
Objective = Callable[[Networks, Batch], "Tensor | Weighted"]
"""Returns the per-example losses, shape [k] or [k, ...], of a batch of k examples; the loop takes the mean.

If parts of the examples must not count (padding of sequences), it returns `Weighted(losses, weights)`."""


@dataclass(kw_only=True)
class Recipe:
    """What to train. Its fields are its hyper-parameters and become command-line flags.

    A recipe of one network and one loss defines `data`, `networks`, `optimizer`, `loss` and `score`. Its fields have
    types that a flag can have: int, float, bool, str, Path, Literal, tuples of them, or one of them or None; Count,
    Amount, Fraction and Share (see `fields`) are numbers with bounds. It inherits these fields; `lr: float = 0.1`
    changes a default. A class without the @dataclass decorator is made a dataclass. No field or attribute may have the
    name of a method or property (`data`, `file`, `name`, ...).

    epochs: passes over the training data. batch_size: examples per optimizer step, over all processes. lr: learning
    rate, which the schedule multiplies. shuffle: a new order each epoch. drop_last: drop a smaller last batch.
    schedule, warmup_steps, decay_steps, decay_factor: how the learning rate changes (see `schedules.lr_factor`).
    clip_norm: largest norm of a network's gradient. ema_decay: decay of the exponential moving average (EMA) of the
    weights. evaluate_every: "1 epoch" or "500 steps". best, best_is: the score that selects the best model, and whether
    highest or lowest is best, which usually follows from its name. patience: evaluations without improvement before
    early stopping. hold_out: share of the training examples that become a validation set (see `parts.hold_out`).
    fold: which part of them does in cross-validation (see `folds.one_fold`).
    init_from: weights to start from (see `runs.weights`). freeze, unfreeze_at, lr_scale: patterns of the names of
    parameters that are not trained, when they are trained after all, and pattern=factor on the learning rate.
    """

    document: ClassVar[str] = ""
    """The document that the network comes from; shown in the plan."""
    documented: ClassVar[str] = ""
    """The document's result, in words; shown beside the run's own. Without a document a baseline of your own, such as
    "logistic regression: 91.2 %"."""
    channels_last: ClassVar[bool] = False
    """Keep convolutions' weights and images in the channels-last layout, which about halves their time on CPUs. The
    values are the same up to rounding, but `view` of an image tensor may fail; `reshape` and `flatten` work."""
    scheduler_every: ClassVar[Literal["step", "epoch"]] = "step"
    """When `scheduler`'s schedulers are stepped; ReduceLROnPlateau always after an evaluation."""
    scheduler_monitors: ClassVar[str | None] = None
    """The score that ReduceLROnPlateau is stepped with, such as val/loss; None means that of `best`, else the loss."""
    closure_after_backward: ClassVar[tuple[str, ...]] = ()
    """Names of the networks whose optimizer's `step(closure)` starts from the gradients of `loss.backward()`, as SAM's
    does: they are computed first, and the closure computes them anew. For one network `("model",)`."""
    headline: ClassVar[tuple[str, ...]] = ()
    """What the report leads with: names of scores, or of figures that are texts; () means the first scores."""

    # Set by `load_recipe`: the module's source, path and namespace, and its helper modules' folder and sources.
    _source: ClassVar[bytes | None] = None
    _origin: ClassVar[Path | None] = None
    _names: ClassVar[dict[str, Any] | None] = None
    _beside: ClassVar[Path | None] = None
    _helpers: ClassVar[dict[str, bytes] | None] = None

    epochs: Count = 1
    """Passes over the training data."""
    batch_size: Count = 64
    """Examples per optimizer step, summed over all processes and micro-batches."""
    lr: Annotated[float, Gt(0)] = 1e-3
    """Learning rate, which a schedule multiplies."""
    shuffle: bool = True
    """Visit the examples in a new random order each epoch."""
    drop_last: bool = False
    """Drop the last batch of an epoch if it is smaller than the others."""
    schedule: ScheduleName = "constant"
    """How the learning rate changes with the step."""
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Optimizer steps over which the learning rate rises (every schedule but constant)."""
    decay_steps: Annotated[int, Ge(0)] = 0
    """Optimizer steps between two decays of the schedule 'step'."""
    decay_factor: Amount = 0.1
    """What the schedule 'step' multiplies the learning rate by."""
    clip_norm: Annotated[float, Gt(0)] | None = None
    """Gradient clipping: scale each network's gradient down to this norm if it is larger."""
    ema_decay: Share | None = None
    """Keep an exponential moving average (EMA) of the weights with this decay, such as 0.999, and evaluate that."""
    evaluate_every: str = "1 epoch"
    """How often to evaluate: '2 epochs' or '500 steps'; always at the end too."""
    best: str | None = None
    """Score that selects the best model, such as test/accuracy."""
    best_is: Literal["highest", "lowest"] | None = None
    """Whether the highest or the lowest score is best (default: by its name; lowest for a loss, ...)."""
    patience: Count | None = None
    """Early stopping: stop after this many evaluations without a better score."""
    hold_out: Share | None = None
    """Share of the training examples, such as 0.1, held out for validation; the test set is scored only at the end."""
    fold: str | None = None
    """Cross-validation: which part of the training examples is the validation set, such as 2/5."""
    init_from: str | None = None
    """Weights to start from: a safetensors file, a run, a file of torch, a Hugging Face folder, torchvision's name."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained, by patterns of their names, such as 'layer1.*'."""
    unfreeze_at: str | None = None
    """When those of --freeze are trained after all: '3 epochs' or '500 steps'."""
    lr_scale: tuple[str, ...] = ()
    """Factors on the learning rate of parameters, by patterns of their names, such as 'layer1.*=0.1'."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        declaration.check_class(cls, Recipe)

    def __new__(cls, *arguments: Any, **fields: Any) -> Self:
        declaration.completed(cls, Recipe)  # a class defined in a notebook
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in declaration.reserved_names(Recipe) and not callable(value):
            raise UserError(declaration.reserved(type(self), name))
        super().__setattr__(name, value)

    # What a recipe must define.

    def data(self, config: DataConfig) -> Data:
        """The training and test sets, and how a raw batch becomes the networks' input on the device.

        config says where files are, which set is wanted, and whether this process may download. Called on every
        process, it must return identical examples on all. Raises UserError if the data are unavailable or damaged.
        """
        raise _incomplete(self)

    def networks(self) -> dict[str, nn.Module]:
        """The networks by name, freshly initialised, on the CPU in float32; for one network `{"model": Net()}`.

        Called again whenever a run is used, with what `data` set on the recipe; it must return the same shapes, and
        read no files, which may be gone by then (see `initial_weights`). One without an objective, such as a frozen
        teacher, keeps its mode in training: `{"model": Net(), "teacher": frozen.eval()}`.
        """
        raise _incomplete(self)

    def optimizer(self, name: str, network: nn.Module) -> Optimizer:
        """The optimizer of the network called `name`, torch's or custom; its lr is that at schedule factor 1.

        Its parameters are the network's. If its `step` requires a closure, as LBFGS's does, the closure returns the
        loss, and computes the gradients, of the full global batch; it finds none when it begins, unless
        `closure_after_backward` says so, as for SAM. With `fused=True` torch updates all parameters in
        one kernel: Adam then takes 0.1 to 0.3 of the time on a CPU (SGD with momentum 0.4 to 0.6), with other rounding.
        """
        raise _incomplete(self)

    def loss(self, networks: Networks, batch: Batch) -> Tensor | Weighted:
        """One loss per example, shape [k] or [k, ...], or Weighted; never their mean, and one kind for every batch.

        The batch is what `Data.prepare` (and in training `augment`) returned, on the device. Runs under autocast if
        --precision asks for it. The loop raises UserError for a mean, and TrainingError for a non-finite loss.
        """
        raise _incomplete(self)

    # What a recipe may define.

    def initial_weights(self, networks: Networks) -> None:
        """Load weights to start from into the networks, such as those of a file.

        Called once per run, in training only, between `networks` and `optimizer`, on each process; a run that is
        resumed, evaluated or used to predict has its own weights. The networks are on the CPU.
        """

    def objectives(self) -> dict[str, Objective]:
        """Network name -> loss. They run in this order within a step; each updates the network it is named after.

        So a GAN has two objectives, `{"discriminator": ..., "generator": ...}`: the second sees the first network
        already updated. Each returns losses as `loss` does; networks that it does not update get no gradients.
        """
        return {"model": self.loss}

    def score(self, networks: Networks, batch: Batch) -> Mapping[str, Tensor | Weighted | Output | Total]:
        """Metrics of an evaluation, one number per example, shape [k], or Weighted; the loop takes their means.

        An Output is not a metric: it is stored, and `figures` finds it in `history.outputs`. A Total is a sum over the
        batch; `set_scores` gets its sum over the whole set. The networks are in evaluation mode, with their EMA weights
        if there are any, and without gradients. The score "loss" of the set "test" is recorded as "test/loss". A batch
        may lack a Weighted score or a Total, such as of a class that it does not have; it counts as nothing.
        """
        return {"loss": self.loss(networks, batch)}

    def set_scores(self, means: Mapping[str, float], totals: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Scores of a whole set that are not means over examples, such as the root of one, F1 or R2.

        Called after `score` has had every example: means are its scores by name, totals its Totals, float64 on the CPU,
        summed over the set. `{"rmse": math.sqrt(means["squared_error"])}`.
        """
        return {}

    def snapshot(self, networks: Networks, data: Data) -> dict[str, Tensor]:
        """Tensors to store at each evaluation, for figures that show the training over time.

        Of any shape and any dtype of safetensors; `figures` finds them in `history.snapshots`, with their steps.
        """
        return {}

    def preview(self, data: Data) -> dict[str, Any]:
        """Figures of the data as training will see them, such as what `augment` does; as `figures` returns them.

        Called once, before the first step of a new run, on the first process. An exception is reported in one line.
        """
        return {}

    def figures(self, networks: Networks, data: Data, history: History) -> dict[str, Any]:
        """What a person wants to see: name -> matplotlib Figure or Animation, or a text.

        Called once, at the end, on the first process; the networks are in evaluation mode on the device. `data.inputs`
        returns prepared examples. An exception is reported in one line and does not fail the run.
        """
        return {}

    def predict(self, networks: Networks, inputs: Inputs) -> Answers:
        """The trained networks' predictions for a person's inputs (`nndist predict`), in evaluation mode.

        By default the inputs are like the test set's (images, or rows of numbers), and each network's output is shown
        as numbers.
        """
        given = inputs.only(*networks.values())
        return inputs.measured({name: network(given) for name, network in networks.items()})

    # Called by the loop, for what fields can't express. All run on every process, and must do the same on each.

    def scheduler(self, name: str, optimizer: Optimizer, total_steps: int) -> LRScheduler | None:
        """A torch.optim.lr_scheduler for a network's optimizer, in place of `schedule`; None for none.

        It is stepped after each optimizer step, or as `scheduler_every` says; ReduceLROnPlateau after each evaluation,
        with the score that `scheduler_monitors` or else `best` names, else test/loss. It is stepped in every step of
        the run, also in those in which `objectives_of_step` leaves its network's objective out. Its state is
        checkpointed. total_steps: of the whole training.
        """
        return None

    def objectives_of_step(self, step: int) -> Collection[str] | None:
        """Names of the objectives of optimizer step `step`, counted from 0; None for all.

        To train a critic five times as often as its generator:
        `{"critic", "generator"} if step % 5 == 4 else {"critic"}`.
        """
        return None

    def before_update(self, name: str, network: nn.Module) -> None:
        """May change the gradients of the network called `name`: those of the global batch, before clipping."""

    def after_step(self, networks: Networks, step: int) -> None:
        """May change anything after `step` optimizer steps: weights, what is frozen, the recipe's attributes.

        But `batch_size` and `epochs`, which are read at the start: a note says that a change has no effect.

        What it changes in the recipe, the networks and the module's values is saved in each checkpoint and restored on
        resuming, if it consists of numbers, strings, tensors, generators, or lists and dicts of them.
        """

    def after_epoch(self, networks: Networks, epoch: int) -> None:
        """Like `after_step`, after `epoch` epochs."""

    def after_evaluation(self, networks: Networks, scores: Mapping[str, float]) -> None:
        """Like `after_step`, after an evaluation; the networks are in training mode. scores: such as "test/loss"."""

    def lr_factor(self, step: int, total_steps: int) -> float | Sequence[float] | Mapping[str, Any]:
        """The factor on the learning rates at optimizer step `step`, counted from 0, of `total_steps`.

        One factor for all, or a list with one per parameter group, or either by network name.
        """
        return lr_factor(
            step,
            total_steps,
            self.schedule,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
            decay_factor=self.decay_factor,
        )

    def validate(self) -> None:
        """Raises UserError for the first invalid field; an override calls this first."""
        check_fields(self)
        if self.schedule == "warmup" and not self.warmup_steps:
            raise UserError("--schedule warmup: needs --warmup-steps")
        if self.schedule == "step" and self.decay_steps < 1:
            raise UserError("--schedule step: needs --decay-steps, the steps between two decays")
        if self.fold is not None:
            from ..data.folds import parsed

            parsed(self.fold)
            if self.hold_out is not None:
                raise UserError(f"--fold {self.fold} and --hold-out {self.hold_out:g}: give one")
        if self.patience is not None and self.best is None:
            raise UserError("--patience: name the score to watch with --best, such as --best test/accuracy")

    def best_direction(self) -> Direction:
        """Whether the highest or lowest score `best` is best: as `best_is` says, else by the score's name.

        Raises UserError if neither tells.
        """
        check_best(self.best)  # networks() may have set it
        found = self.best_is or direction_of(self.best or "")
        if found is None:
            raise UserError(
                f"--best {self.best}: its name does not say whether highest or lowest is best; add --best-is "
                "highest or --best-is lowest"
            )
        return found

    @property
    def name(self) -> str:
        """The module's name, which also names the folder of its runs; in a notebook the class's, in lower case."""
        file = self.file
        return file.stem if file else type(self).__name__.lower()

    @property
    def file(self) -> Path | None:
        """The module's file; None in a notebook."""
        if origin := vars(type(self)).get("_origin"):  # not that of a recipe that this one inherits from
            return origin
        try:
            file = Path(inspect.getfile(type(self))).absolute()
        except (OSError, TypeError):
            return None
        return file if file.is_file() else None

    def source(self) -> bytes | None:
        """The module's source when the recipe was loaded; None in a notebook."""
        source = vars(type(self)).get("_source")
        return source if source is not None or self.file is None else self.file.read_bytes()

    def source_hash(self) -> str:
        """SHA-256 of the module's source, or of a notebook's class: identifies the version that a run trained."""
        source = self.source()
        if source is None:
            try:
                source = inspect.getsource(type(self)).encode()
            except (OSError, TypeError):
                source = repr(sorted(vars(type(self)))).encode()
        return hashlib.sha256(source).hexdigest()

    def helpers(self) -> dict[str, bytes]:
        """The sources of the modules that the recipe imports from its file's folder, by their paths there."""
        kind = type(self)
        if vars(kind).get("_helpers") is None:
            source, file = self.source(), self.file
            kind._helpers = helpers.helpers_of(source, file.parent) if source is not None and file else {}
        return kind._helpers or {}

    def found(self) -> dict[str, Any]:
        """What `data` has set on the recipe besides its fields, such as the number of classes.

        A run stores what a file can hold of it (see `kept.kept`), so that its networks can be built without the data.
        """
        names = vars(self).keys() - {field.name for field in dataclasses.fields(self)}
        return {name: vars(self)[name] for name in sorted(names)}

    def fields(self) -> dict[str, Any]:
        """Every hyper-parameter by name, as JSON (see `fields.to_json`); URLs are without what keys they hold."""
        found = {field.name: to_json(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {name: plain_urls(value) if isinstance(value, str) else value for name, value in found.items()}


def _incomplete(recipe: Recipe) -> UserError:
    """Says which methods the class of a recipe lacks, all at once."""
    kind = type(recipe)
    needed = ["data", "networks", "optimizer", *(["loss"] if kind.objectives is Recipe.objectives else [])]
    missing = [f"{name}()" for name in needed if getattr(kind, name) is getattr(Recipe, name)]
    return UserError(
        f"{kind.__name__} does not define {', '.join(missing)}, as every recipe does; see recipes/README.md"
    )


def meant(recipe: Recipe, name: str) -> Any:
    """The value of an inherited field; None if the recipe has a field of its own, of another type, by that name."""
    is_inherited = hints_of(type(recipe))[name] == hints_of(Recipe)[name]
    return getattr(recipe, name) if is_inherited else None
