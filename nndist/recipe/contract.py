"""The contract of a recipe: what to train, and nothing of devices, processes, files, precision or tracking.

A recipe is a dataclass in a module of its own. The least that one needs:

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

The loop asks in this order: `validate`; `data`, once on each process; `networks`, `initial_weights` and, for each
network, `optimizer`; then in each step each of the `objectives`; in an evaluation `score` for each batch, then
`snapshot`; at the end `figures`. `predict` is asked when somebody uses the trained networks. Random numbers that `data`
and `networks` draw from torch are those of --seed.

A run is used without what its training has read. `networks` is called again then, and `data` need not be: what `data`
has found out, and sets on the recipe (`self.classes_of_mine = [...]`, a vocabulary, a `Scaling`), is kept in the run's
folder and is set before `networks` is called. A file of weights is read in `initial_weights`, in training only.

A batch passes through three places. `Streamed(decode=...)` makes tensors of one example as the disk has it, in a worker
process. `Data(prepare=...)` makes the networks' input of a whole raw batch on the device, in training and wherever the
networks are used, and draws nothing at random. `Data(augment=...)` changes a prepared training batch at random, and
runs in training only. Units are none of these places' business: `scaling.Scaled` is a network that takes and gives
numbers as they were measured.

In shapes k is the number of examples of a batch, or of the part of it that one process holds: a method must not count
on a size. `recipes/mnist_cnn.py` is a short recipe, `recipes/mnist_gan.py` one of two networks; `launch/new.py` writes
one to start from. Losses are per example because only so can a step be exact: with n examples in the batch of all
processes, it is that of sum(losses) / n, whatever part each process holds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ..directions import Direction, direction_of
from ..errors import UserError
from ..metrics import Output, Weighted
from ..schedules import ScheduleName, lr_factor
from . import declaration, helpers
from .fields import to_json

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

    from ..data.config import DataConfig
    from ..data.sets import Data
    from ..prediction.inputs import Answers, Inputs
    from ..runs.tracking import History

Batch = Any
"""One (micro-)batch as `Data.prepare` made it: a tuple of tensors of the same first dimension, or whatever else."""
Networks = Mapping[str, nn.Module]
Activation = Literal["relu", "sigmoid", "tanh", "softplus"]
ACTIVATIONS: dict[str, nn.Module] = {
    "relu": nn.ReLU(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "softplus": nn.Softplus(),
}
"""The activation functions that small recipes let one choose (document 001, part 2)."""
Cell = Literal["rnn", "lstm", "gru"]
CELLS: dict[str, Any] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
"""The recurrent layers that recipes let one choose: plain (tanh), LSTM or GRU (document 002, section 4)."""
Objective = Callable[[Networks, Batch], "Tensor | Weighted"]
"""Gives the per-example losses, shape [k] or [k, ...], of a batch of k examples; the loop takes the mean.

Where parts of the examples must not count (padding of sequences), it gives them as `Weighted(losses, weights)`."""


@dataclass(kw_only=True)
class Recipe:
    """What to train. Its fields are its hyper-parameters and become flags of the command line.

    A recipe of one network and one loss defines `data`, `networks`, `optimizer`, `loss` and `score`. Its fields are of
    types that a flag can have: int, float, bool, str, Path, Literal, tuples of them, or one of them or None. Beside its
    own it has these; their defaults are changed by `lr: float = 0.1`. A class without the decorator @dataclass is made
    a dataclass. No field or attribute may be called as a method or property is (`data`, `file`, `name`, ...).

    epochs: passes over the training data. batch_size: examples of an optimizer step, over all processes. lr: learning
    rate, times what the schedule says. shuffle: a new order in each epoch. drop_last: no smaller batch at its end.
    schedule, warmup_steps, decay_steps, decay_factor: how the learning rate changes (see `schedules.lr_factor`).
    clip_norm: the largest norm of a network's gradient. ema_decay: what a step leaves of the moving average of the
    weights. evaluate_every: "1 epoch" or "500 steps". best, best_is: the score that the best model is kept by, and
    whether it is best where it is highest or lowest, which mostly follows from its name. patience: evaluations without
    a better one, after which the training stops. hold_out: the share of the training examples that make a validation
    set (see `sets.hold_out`).
    """

    document: ClassVar[str] = ""
    """Where the network comes from; shown in the plan."""
    documented: ClassVar[str] = ""
    """The figure that the document gives, in words; shown beside the run's own."""
    channels_last: ClassVar[bool] = False
    """Keep convolutions' weights and images in the channels-last layout, which about halves their time on CPUs. The
    values are the same up to rounding, but `view` of an image's tensor then fails where `reshape` or `flatten` work."""
    scheduler_every: ClassVar[Literal["step", "epoch"]] = "step"
    """After what `scheduler`'s schedulers are stepped; ReduceLROnPlateau always is after an evaluation."""
    headline: ClassVar[tuple[str, ...]] = ()
    """What the report leads with: names of scores, or of figures that are texts; () is its first scores."""

    # Of a class that `load_recipe` read: the module's text, place and names, and its helpers' folder and texts.
    _source: ClassVar[bytes | None] = None
    _origin: ClassVar[Path | None] = None
    _names: ClassVar[dict[str, Any] | None] = None
    _beside: ClassVar[Path | None] = None
    _helpers: ClassVar[dict[str, bytes] | None] = None

    epochs: int = 1
    """Passes over the training data."""
    batch_size: int = 64
    """Examples per optimizer step, summed over all processes and micro-batches."""
    lr: float = 1e-3
    """Learning rate; a schedule multiplies it."""
    shuffle: bool = True
    """Visit the examples in a new random order each epoch."""
    drop_last: bool = False
    """Leave out the last batch of an epoch where it is smaller than the others."""
    schedule: ScheduleName = "constant"
    """How the learning rate changes with the step."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises (every schedule but constant)."""
    decay_steps: int = 0
    """Optimizer steps between two decays of the schedule 'step'."""
    decay_factor: float = 0.1
    """What the schedule 'step' multiplies the learning rate by."""
    clip_norm: float | None = None
    """Scale each network's gradient down to this norm where it is longer."""
    ema_decay: float | None = None
    """Keep a moving average of the weights with this decay, such as 0.999, and evaluate that."""
    evaluate_every: str = "1 epoch"
    """How often to evaluate: '2 epochs' or '500 steps'; always at the end too."""
    best: str | None = None
    """Score by which the best model is kept, such as test/accuracy."""
    best_is: Literal["highest", "lowest"] | None = None
    """Whether the best score is the highest or the lowest (default: by its name: a loss lowest, ...)."""
    patience: int | None = None
    """Stop after this many evaluations without a better score."""
    hold_out: float | None = None
    """Share of the training examples, such as 0.1, kept apart as a validation set; the test set waits for the end."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        declaration.check_class(cls, Recipe)

    def __new__(cls, *arguments: Any, **fields: Any) -> Self:
        declaration.completed(cls, Recipe)  # a class that is written in a notebook
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in declaration.reserved_names(Recipe) and not callable(value):
            raise UserError(declaration.reserved(type(self), name))
        super().__setattr__(name, value)

    # What a recipe must say.

    def data(self, config: DataConfig) -> Data:
        """The training and test sets, and how a raw batch becomes the networks' input on the device.

        config says where files lie, which set is wanted, and whether this process may download. Called on every
        process, it must give the same examples on each. Raises UserError where the data can't be had or are damaged.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define data()")

    def networks(self) -> dict[str, nn.Module]:
        """The networks by name, freshly initialised, on the CPU in float32; one network is `{"model": Net()}`.

        Called again wherever a run is used, with what `data` has set on the recipe; it must give the same shapes, and
        read no files: they may be gone by then (see `initial_weights`).
        """
        raise NotImplementedError(f"{type(self).__name__} does not define networks()")

    def optimizer(self, name: str, network: nn.Module) -> Optimizer:
        """The optimizer of the network called `name`, torch's or the recipe's own; its lr is that of factor 1.

        Its parameters are the network's. One whose `step` must be given a closure, such as LBFGS, is given the loss
        and the gradients of the whole global batch. `fused=True` has torch update all parameters in one kernel: Adam
        then takes 0.1 to 0.3 of the time on a CPU (SGD with momentum 0.4 to 0.6), with other rounding.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define optimizer()")

    def loss(self, networks: Networks, batch: Batch) -> Tensor | Weighted:
        """One loss per example, shape [k] or [k, ...], or these with their weights; never their mean.

        The batch is what `Data.prepare` (and in training `augment`) made, on the device. Under autocast where
        --precision says so. The loop raises UserError for a mean, and TrainingError for a loss that is not finite.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define loss()")

    # What a recipe may say.

    def initial_weights(self, networks: Networks) -> None:
        """Puts weights that the training starts from into the networks, such as those of a file.

        Called once for a run, in training only, between `networks` and `optimizer`, on each process; a run that goes
        on, is evaluated or asked has its own weights. The networks are on the CPU.
        """

    def objectives(self) -> dict[str, Objective]:
        """Network name -> loss. They run in this order inside one step; each updates the network it is named after.

        So a GAN is two objectives, `{"discriminator": ..., "generator": ...}`: the second one sees the first network as
        the first one has left it. Each gives losses as `loss` does; the networks it does not update get no gradients.
        """
        return {"model": self.loss}

    def score(self, networks: Networks, batch: Batch) -> Mapping[str, Tensor | Weighted | Output]:
        """Figures of an evaluation, one number per example, shape [k], or Weighted; the loop sums and counts them.

        An Output is no figure: it is kept, and `figures` finds it in `history.outputs`. The networks are in evaluation
        mode, with the moving average of their weights where there is one, and without gradients. Recorded as
        "test/loss" for the score "loss" of the set "test".
        """
        return {"loss": self.loss(networks, batch)}

    def snapshot(self, networks: Networks, data: Data) -> dict[str, Tensor]:
        """Tensors to keep at each evaluation, for figures that show the training over time.

        Of any shape and of a type that safetensors has; `figures` finds them in `history.snapshots`, with their steps.
        """
        return {}

    def figures(self, networks: Networks, data: Data, history: History) -> dict[str, Any]:
        """What a person wants to look at: name -> matplotlib Figure or Animation, or a text.

        Called once, at the end, on the first process; the networks are in evaluation mode on the device. `data.inputs`
        gives prepared examples. What it raises costs one line and not the run.
        """
        return {}

    def predict(self, networks: Networks, inputs: Inputs) -> Answers:
        """What the trained networks answer to a person's inputs (`launch/predict.py`), in evaluation mode.

        By default the inputs are like the test set's (images, or rows of numbers), and what each network gives for them
        is shown as numbers.
        """
        batch = inputs.batch()
        outputs = {name: network(batch[0]) for name, network in networks.items()}
        return inputs.measured(outputs)

    # What the loop calls, for what the fields can't say. All of it runs on every process, which must do the same.

    def scheduler(self, name: str, optimizer: Optimizer, total_steps: int) -> LRScheduler | None:
        """A scheduler of torch.optim.lr_scheduler for a network's optimizer, in place of `schedule`; None: no such.

        It is stepped after each optimizer step, or as `scheduler_every` says; ReduceLROnPlateau after each evaluation,
        with the score that `best` names, else test/loss. Its state is in the checkpoint. total_steps: of the training.
        """
        return None

    def objectives_of_step(self, step: int) -> Collection[str] | None:
        """Names of the objectives that optimizer step `step`, counted from 0, takes; None: all of them.

        A critic that is trained five times as often as its generator:
        `{"critic", "generator"} if step % 5 == 4 else {"critic"}`.
        """
        return None

    def before_update(self, name: str, network: nn.Module) -> None:
        """May change the gradients of the network called `name`: they are the global batch's, not clipped yet."""

    def after_step(self, networks: Networks, step: int) -> None:
        """May change anything, after `step` optimizer steps: weights, what is frozen, the recipe's own attributes.

        What it changes in the recipe, the networks and the module's values, as far as it is numbers, texts, tensors,
        generators, or lists and dicts of them, is saved in each checkpoint and comes back when the run is resumed.
        """

    def after_epoch(self, networks: Networks, epoch: int) -> None:
        """The same, after `epoch` epochs."""

    def after_evaluation(self, networks: Networks, scores: Mapping[str, float]) -> None:
        """The same, after an evaluation; the networks are in training mode. scores: by name, such as "test/loss"."""

    def lr_factor(self, step: int, total_steps: int) -> float | Sequence[float] | Mapping[str, Any]:
        """What the learning rates are multiplied by at optimizer step `step`, counted from 0, of `total_steps`.

        One factor for all, or a list of one for each group of parameters, or either by network name.
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
        """Raises UserError for the first field that can't be meant; one that has more to check calls this first."""
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        for name in (field.name for field in dataclasses.fields(self)):
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{name.replace('_', '-')} {value}: must be a number")
        if not self.lr > 0:
            raise UserError(f"--lr {self.lr}: must be above 0")
        if self.warmup_steps < 0:
            raise UserError(f"--warmup-steps {self.warmup_steps}: must not be negative")
        if self.schedule == "warmup" and not self.warmup_steps:
            raise UserError("--schedule warmup: say over how many steps with --warmup-steps")
        if self.schedule == "step" and self.decay_steps < 1:
            raise UserError("--schedule step: say after how many steps the learning rate falls with --decay-steps")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(f"--clip-norm {self.clip_norm}: must be above 0")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"--ema-decay {self.ema_decay}: must lie between 0 and 1, such as 0.999")
        if self.hold_out is not None and not 0 < self.hold_out < 1:
            raise UserError(f"--hold-out {self.hold_out:g}: must lie between 0 and 1, such as 0.1")
        if self.patience is not None and self.patience < 1:
            raise UserError(f"--patience {self.patience}: must be at least 1")
        if self.patience is not None and self.best is None:
            raise UserError("--patience: name the score to watch with --best, such as --best test/accuracy")

    def best_direction(self) -> Direction:
        """Whether the score `best` is best where it is highest or lowest: as `best_is` says, or by the score's name.

        Raises UserError where neither tells.
        """
        found = self.best_is or direction_of(self.best or "")
        if found is None:
            raise UserError(
                f"--best {self.best}: its name does not say whether it is best highest or lowest; say --best-is "
                "highest or --best-is lowest"
            )
        return found

    @property
    def name(self) -> str:
        """The name of the module, which is the name of the runs' folder; in a notebook that of the class."""
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
        """The module's text as it was when the recipe was loaded; None in a notebook."""
        source = vars(type(self)).get("_source")
        return source if source is not None or self.file is None else self.file.read_bytes()

    def source_hash(self) -> str:
        """SHA-256 of the module's text, or of a notebook's class: a run says which version of the recipe it trained."""
        source = self.source()
        if source is None:
            try:
                source = inspect.getsource(type(self)).encode()
            except (OSError, TypeError):
                source = repr(sorted(vars(type(self)))).encode()
        return hashlib.sha256(source).hexdigest()

    def helpers(self) -> dict[str, bytes]:
        """The texts of the modules that the recipe imports from beside its file, by their paths there."""
        kind = type(self)
        if vars(kind).get("_helpers") is None:
            source, file = self.source(), self.file
            kind._helpers = helpers.helpers_of(source, file.parent) if source is not None and file else {}
        return kind._helpers or {}

    def found(self) -> dict[str, Any]:
        """What `data` has set on the recipe besides its fields, such as a number of classes.

        A run keeps what a file can hold of it (see `kept.kept`), so that its networks can be made without the data.
        """
        names = vars(self).keys() - {field.name for field in dataclasses.fields(self)}
        return {name: vars(self)[name] for name in sorted(names)}

    def fields(self) -> dict[str, Any]:
        """Every hyper-parameter by name, as JSON gives it back (see `fields.to_json`)."""
        return {field.name: to_json(getattr(self, field.name)) for field in dataclasses.fields(self)}


@dataclass(kw_only=True)
class Classifier(Recipe):
    """A recipe whose one network gives logits, shape [k, classes], for batches of (inputs, labels).

    labels: int64 [k], from 0. It is left to define `data`, `networks` and `optimizer`.
    """

    def loss(self, networks: Networks, batch: Batch) -> Tensor:
        """Cross-entropy of each example in nats, shape [k]."""
        inputs, labels = batch
        return F.cross_entropy(networks["model"](inputs), labels, reduction="none")

    def score(self, networks: Networks, batch: Batch) -> dict[str, Tensor | Output]:
        """Cross-entropy in nats and 1 or 0 for a right or wrong answer, each [k]; the logits are kept."""
        inputs, labels = batch
        logits = networks["model"](inputs)
        return {
            "loss": F.cross_entropy(logits, labels, reduction="none"),
            "accuracy": (logits.argmax(1) == labels).float(),
            "logits": Output(logits),
        }

    def figures(self, networks: Networks, data: Data, history: History) -> dict[str, Any]:
        """Confusion matrix, the worst errors, the first predictions, and a table of both."""
        from ..figures.plots import classification

        return classification(networks["model"], data, self.name, history)

    def predict(self, networks: Networks, inputs: Inputs) -> Answers:
        """The likeliest class of each input."""
        return inputs.classified(networks["model"](inputs.batch()[0]))
