"""The shared loop: fetch, forward, backward, step, log, evaluate, save. Every recipe is trained by it."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..config import Interval, RunConfig
from ..data.feed import Feed, GlobalBatch
from ..data.sets import Data, ExampleSet
from ..distributed.blocks import recompute_activations
from ..distributed.runtime import Runtime
from ..errors import Preempted, TrainingError, UserError, remedy_for_memory
from ..metrics import Means, Weighted, text_of
from ..recipe.contract import Classifier, Networks, Recipe
from ..runs import checkpoint, network_state, optimizer_state
from ..runs.python_state import PythonState
from ..runs.tracking import NullTracker, Record
from . import evaluation, snapshot
from .ema import average_of
from .evaluation import evaluating, forked_random_state
from .fsdp import sharding_called
from .learning_rates import LearningRates
from .micro_batches import MicroBatches
from .optimizers import make_optimizer
from .step import DDPStep, Losses, ShardedStep, Step


class _Taken(NamedTuple):
    """A step whose losses no record holds yet: which batch it was, and the losses."""

    epoch: int
    batch: int
    losses: Losses


class Trainer:
    """One run: the state of the training and the loop over it."""

    def __init__(self, recipe: Recipe, config: RunConfig, runtime: Runtime, data: Data):
        self.recipe, self.config, self.runtime = recipe, config, runtime
        self.data = data.to(runtime.device)
        self.feed = Feed(
            self.data.train,
            batch_size=recipe.batch_size,
            seed=config.seed,
            shuffle=recipe.shuffle,
            rank=runtime.rank,
            world_size=runtime.world_size,
            accumulate=config.accumulate,
            drop_last=recipe.drop_last,
        )
        self.total_steps = recipe.epochs * self.feed.steps_per_epoch
        self.last_step = min(self.total_steps, config.max_steps or self.total_steps)
        self.log_every = config.log_every or max(1, min(50, self.last_step // 100))
        self.evaluate_every = evaluation_steps(recipe, self.feed.steps_per_epoch)
        save_every = Interval.parse(config.save_every, "--save-every")
        self.save_steps = save_every.in_steps(self.feed.steps_per_epoch)
        self.save_minutes = save_every.every if self.save_steps is None else None
        runtime.seed(config.seed)
        self.sharding = sharding_called(config.shard, runtime)
        networks = recipe.networks()
        for network in networks.values():
            network.train()
        self.fields = recipe.fields()  # as they were given: hooks may change them, which is Python's state
        self.python_state = PythonState(recipe, networks)  # before initial_weights, which a resumed run leaves out
        if not goes_on(recipe, config):
            recipe.initial_weights(networks)
        if config.checkpoint_activations and not sum(map(recompute_activations, networks.values())):
            raise UserError(
                f"--checkpoint-activations: recipe {recipe.name} has no stack of repeated blocks; leave the flag out"
            )
        self._initialise_lazy_layers(networks)
        self.networks = {
            name: self.sharding.place(network, channels_last=recipe.channels_last) for name, network in networks.items()
        }
        del networks  # where they are split, the whole ones must go
        self.optimizers = {name: make_optimizer(recipe, name, net) for name, net in self.networks.items()}
        self.rates = LearningRates(recipe, self.optimizers, self.total_steps)
        step = ShardedStep if self.sharding.divided else DDPStep if config.gradient_sync == "ddp" else Step
        self.engine: Step = step(recipe, self.data, self.networks, self.optimizers, runtime, config.seed)
        self._check_hooks()
        self.average = average_of(self.networks, recipe.ema_decay)
        self.micro_batches = MicroBatches(self.engine, self.feed, runtime, lambda line: self.tracker.say(line))
        self.tracker: NullTracker = NullTracker()
        self.folder = Path()
        self.epoch, self.batch, self.step = 0, 0, 0  # the next batch, and the optimizer steps done
        self.scores: dict[str, float] = {}
        self.best: dict[str, Any] | None = None
        self.tested: int | None = None  # step of the weights that were tested at the end, beside a validation set
        self.evaluations_since_best = 0
        self.stopping = False
        self.stopped_early = ""  # why, where the training ended before its last step
        self.signal: int | None = None
        self.on_evaluation: Callable[[], None] = lambda: None
        self.began = time.perf_counter()
        self.described: dict[str, Any] = {}  # run.json as this launch wrote it last
        self.found: tuple[dict[str, Any], dict[str, torch.Tensor]] = ({}, {})  # what run.json keeps of the recipe
        self.saved: list[int] = []  # steps of the checkpoints that this run has written and not removed
        self._writer = checkpoint.Writer()
        self._pending: list[_Taken] = []
        self.window = Means()
        self.examples = self._timed_examples = 0  # since the last record, and of these, by this process
        self.counted: Counter[str] = Counter()  # since the last record, the examples that each objective has seen
        self._lr = self.rates.first  # that the last step was taken with
        self._first_step = True  # of this launch
        self._noted: set[str] = set()  # buffers and
        self.noted_lost: set[str] = set()  # values that something was said of
        self._mark = self._last_save = time.perf_counter()
        self._next_agreement = 0
        self._agreed_at = (0, 0.0)
        if recipe.best is not None:
            self._check_best(recipe.best)
        for network in self.networks.values():
            network.train()
        network_state.check_savable(self.networks)
        network_state.extra_states(self.networks)  # one that can't be saved is said now
        self.notes = self._foreseen()
        self.names = {name: set(network_state.own_tensors(net)) for name, net in self.networks.items()}
        self.python_state.networks, self.python_state.optimizers = self.networks, self.optimizers
        self.python_state.begin()
        self.engine.rehearse(self.feed.rehearsal)
        self.engine.buffer_sync.begin()
        # From here on randomness is dropout's: one stream per process
        runtime.seed(config.seed, rank=runtime.rank)

    def _initialise_lazy_layers(self, networks: dict[str, nn.Module]) -> None:
        """Lets lazy layers learn their shapes from the first examples; nothing else runs a recipe's loss besides steps.

        That is in evaluation mode, so that no running statistics change.
        """
        if not any(map(network_state.is_lazy, networks.values())):
            return
        (micro,) = self.feed.rehearsal().micro_batches
        inputs = self.data.prepare(micro.raw)
        with evaluating(networks):
            for name, network in networks.items():
                networks[name] = network.to(self.runtime.device)
            for objective in self.recipe.objectives().values():
                objective(networks, inputs)
        for name, network in networks.items():
            if network_state.is_lazy(network):
                raise UserError(
                    f"recipe {self.recipe.name}: a lazy layer of {name!r} learns no shape from the loss of the first "
                    "examples; give it its shape"
                )

    def _foreseen(self) -> list[str]:
        """What may end the training later, or may not be meant, for the plan."""
        notes = []
        modules = [module for network in self.networks.values() for module in network.modules()]
        if self.runtime.world_size > 1 and any(m._backward_hooks or m._backward_pre_hooks for m in modules):
            notes.append(
                "the network's hooks on gradients see each process's part of a batch: what they change may depend on "
                "the number of processes"
            )
        left = len(self.data.train) % self.recipe.batch_size
        short = self.feed.steps_per_epoch * self.recipe.batch_size > len(self.data.train)  # the last batch is taken
        if short and left == 1 and self.micro_batches.has_batch_norm:
            notes.append(
                f"the last batch of an epoch has 1 example (of {len(self.data.train):,}), which BatchNorm may refuse: "
                "--drop-last leaves it out"
            )
        return notes

    def _check_hooks(self) -> None:
        """Raises UserError for hooks that would act on each process's gradients by themselves."""
        if self.runtime.world_size == 1:
            return
        for name, network in self.networks.items():
            for key, parameter in network.named_parameters():
                if parameter._post_accumulate_grad_hooks or parameter._backward_hooks:
                    raise UserError(
                        f"recipe {self.recipe.name}: {name}.{key} has a hook on its gradient, which would see each "
                        "process's own and not that of the batch; change the gradient in before_update() instead, or "
                        "train on one process"
                    )

    def fit(self) -> None:
        """Trains from the present position to the end, early stopping, `--max-steps` or a signal."""
        self._mark = self._last_save = time.perf_counter()
        self._next_agreement = self.step + 1
        while self.step < self.last_step and not self.stopping:
            for batch in self.feed.epoch(self.epoch, self.batch):
                if not self.take_step(batch):
                    break  # the feed now gives it in smaller micro-batches
                self.recipe.after_step(self.networks, self.step)
                if self.batch == 0:
                    self.rates.after_epoch()
                    self.recipe.after_epoch(self.networks, self.epoch)
                due = self.step % self.evaluate_every == 0 or self.step == self.total_steps
                if due or self.step == self.last_step:
                    self.evaluate(counts=due)
                if self.save_steps and self.step % self.save_steps == 0:
                    self.save()
                if self.step >= self._next_agreement or (self.signal and self.runtime.world_size == 1):
                    self.agree()
                if self.stopping or self.step == self.last_step:
                    break
        self.save()
        self.finish_saving()
        if self.data.sets_at_end():
            self.test()

    @cached_property
    def fingerprint(self) -> str:
        """By which a run that goes on knows its training examples."""
        return self.data.train.fingerprint()

    def take_step(self, batch: GlobalBatch) -> bool:
        """One optimizer step; False where memory was short for it.

        The losses stay on the device, where nothing waits for them before the next record.
        """
        self.rates.before_step(self.step, self.total_steps)
        losses = self.micro_batches.take(batch, self.recipe.objectives_of_step(self.step))
        if losses is None:
            return False
        self._lr = self.rates.first
        self.rates.after_step()
        self.step += 1
        if self._first_step:  # the optimizers' states are there now, on all processes: one that can't be saved is said
            self._first_step = False
            optimizer_state.optimizer_state(self.optimizers, self.networks)
        last = batch.index + 1 == self.feed.steps_per_epoch
        self.epoch, self.batch = (batch.epoch + 1, 0) if last else (batch.epoch, batch.index + 1)
        self.average.update(self.step)
        self.tracker.advance(1)
        self._pending.append(_Taken(batch.epoch, batch.index, losses))
        for name, norm in self.engine.norms.items():
            finite_norm = norm.isfinite()  # the scaler of fp16 skips a step whose gradient overflows
            self.window.add(f"gradient_norm/{name}", Weighted(norm.where(finite_norm, 0.0), finite_norm))
        self.examples += batch.size
        self._timed_examples += batch.size
        self.counted.update(dict.fromkeys(losses, batch.size))
        if len(self.engine.buffer_sync.changed) > len(self._noted):
            self._note_buffers()
        if self.step % self.log_every == 0:
            self.log()
        return True

    def _note_buffers(self) -> None:
        """Says once of which buffers the processes take the mean."""
        names = [name for name in self.engine.buffer_sync.changed if name not in self._noted]
        self._noted.update(names)
        self.tracker.say(
            f"note     {', '.join(names)}: updated by the recipe's own code; it is averaged over the processes "
            "after each step, but a forward pass sees its own process's update only, so results may depend on the "
            "number of processes"
        )

    def agree(self) -> None:
        """Lets all processes act on what one knows: a signal, or that it is time to save.

        It is one small collective about once a second, at steps that follow from the slowest process's clock.
        Raises Preempted, after saving, where a signal asked one of them to stop.
        """
        self.runtime.alive()
        now = time.perf_counter()
        step, then = self._agreed_at
        per_step = (now - then) / (self.step - step) if then else 1.0
        due = self.save_minutes is not None and now - self._last_save >= 60 * self.save_minutes
        signal, save, slowest = self.runtime.max([float(self.signal or 0), float(due), per_step])
        self._next_agreement = self.step + max(1, min(10_000, int(1.0 / max(slowest, 1e-6))))
        self._agreed_at = (self.step, time.perf_counter())
        if save or signal:
            self.save()
        if signal:
            self.finish_saving()
            by = "Ctrl-C" if int(signal) == 2 else f"signal {int(signal)}"
            raise Preempted(int(signal), f"stopped by {by} after step {self.step}; saved")

    def log(self) -> None:
        """Records the exact mean loss since the last record; raises TrainingError where it is not finite."""
        if not self.examples:
            return
        reduced = self._gather_losses()
        named = {}
        for name in self.engine.objectives:
            mean, count = reduced.pop(name, (math.nan, 0))
            assert count == self.counted[name], f"{count} losses of {name!r} for {self.counted[name]} examples"
            if not count:  # not due since the last record
                continue
            named["train/loss" if name == "model" else f"train/loss/{name}"] = mean
        norms = {name.removesuffix("/model"): mean for name, (mean, _) in reduced.items()}
        rate = self._timed_examples / max(1e-9, time.perf_counter() - self._mark)
        self.tracker.log({**self._where(), **named, "lr": self._lr, **norms, "examples_per_second": round(rate, 1)})
        self.tracker.show(**{name.removeprefix("train/"): f"{v:.4g}" for name, v in named.items()}, **self._shown(rate))
        self.window = Means()
        self.examples = self._timed_examples = 0
        self.counted.clear()
        self._mark = time.perf_counter()

    def _gather_losses(self) -> dict[str, tuple[float, int]]:
        """Adds the pending losses to the window of the next record, and gives its means and counts so far."""
        for name in self.engine.objectives:
            for *_, losses in self._pending:
                for loss in losses.get(name, ()):
                    self.window.add(name, loss)
        reduced = self.window.reduce(self.runtime.sum, self.runtime.device)
        means = [reduced[name] for name in self.engine.objectives if name in reduced]
        if not all(math.isfinite(mean) or not count for mean, count in means):
            self._stop_for_non_finite_loss()
        self._pending.clear()
        return reduced

    def evaluate(self, *, counts: bool = True) -> None:
        """Evaluates the sets that do not wait for the end, records the scores, and judges whether they are the best.

        counts: False where --max-steps ends the run between two evaluations: a longer run would have none here, so that
        nothing may follow from it.
        """
        self.log()
        self.tracker.activity("evaluating")
        with self._evaluating():
            self.scores = self._scores_of(self.data.sets_in_training())
            if type(self.recipe).snapshot is not Recipe.snapshot:
                networks: Networks | None = self.networks  # on all processes: it may change the recipe
                if self.sharding.divided:
                    networks = self.sharding.whole(self.networks, self.recipe.networks)
                if networks is not None:
                    with evaluating(networks):
                        kept = self.recipe.snapshot(networks, self.data)
                    if kept and self.runtime.is_main:
                        self.tracker.keep_snapshot(self.step, checkpoint.plain(kept))
        epoch = f"epoch {self._where()['epoch']:g}/{self.recipe.epochs}"
        self._record(f"{epoch}  step {self.step:,}", self.scores)
        if counts:
            improved = self._judge()
            self.rates.after_evaluation(self.scores)
            self.recipe.after_evaluation(self.networks, self.scores)
            if improved:
                self.save()
        self.on_evaluation()
        self._mark = time.perf_counter()

    def test(self) -> None:
        """Evaluates what has waited for the end: once, with the weights that the validation set has chosen.

        They are the best ones, where the recipe names a score, else the last. The record comes after the last save, so
        that a run which goes on has not seen it.
        """
        self.tracker.activity("testing")
        chosen = self._best_checkpoint()
        with snapshot.put_in(self, chosen) if chosen is not None else contextlib.nullcontext(), self._evaluating():
            tested = self._scores_of(self.data.sets_at_end())
        self.tested = self.step if chosen is None else chosen.step
        which = "the best" if self.best is not None and self.best["step"] == self.tested else "the last"
        self._record(f"test with {which} weights, step {self.tested:,}", tested)
        self.scores = {**self.scores, **tested}
        if self.best is not None and self.best["step"] == self.tested:
            self.best = {**self.best, "scores": {**self.best["scores"], **tested}}
        self.on_evaluation()

    def _best_checkpoint(self) -> checkpoint.Checkpoint | None:
        """The best weights on all processes; None where they are the present ones, or can't be read, which is said."""
        if self.best is None or self.best["step"] == self.step:
            return None
        found, problem = None, ""
        try:
            path = self.folder / "checkpoints" / checkpoint.folder_name(self.best["step"])
            found = self.sharding.read(path, self.networks)
        except checkpoint.DamagedCheckpoint as damage:
            problem = str(damage)
        problem = next(filter(None, self.runtime.gather_objects(problem)), "")
        if problem:
            self.tracker.say(f"the best weights can't be read ({problem}): the last ones are tested")
        return None if problem else found

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Within it networks are as they are evaluated; random numbers that are drawn do not move the training's."""
        size = self.config.eval_batch_size
        remedy = remedy_for_memory(self.runtime.rank, "an evaluation", f"give --eval-batch-size {-(-size // 2)}")
        with self.average.applied(), forked_random_state(self.runtime, self.config.seed), remedy:
            yield

    def _scores_of(self, sets: Mapping[str, ExampleSet]) -> dict[str, float]:
        found = evaluation.evaluate_all(
            self.recipe, self.networks, self.data, sets, self.runtime, self.config.eval_batch_size
        )
        self.tracker.history.outputs = found.outputs
        return found.scores

    def _record(self, when: str, scores: dict[str, float]) -> None:
        self.tracker.log({**self._where(), **scores, "data": self.data.source})
        self.tracker.say(f"{when}  {text_of(scores)}  ({self.data.source})")
        self.tracker.activity("")

    def save(self) -> None:
        """Publishes a checkpoint of the present state; all processes take part. In the background, unless sharded.

        Of those that this run wrote, the newest `--keep` and the best stay. Raises TrainingError on all processes where
        an earlier one could not be written, or this one in the foreground.
        """
        if self.step in self.saved:
            return
        if self.examples:
            self._gather_losses()  # a state whose loss is not finite is never saved
        self.finish_saving()
        self.saved.append(self.step)
        best_step = self.best["step"] if self.best else None
        kept = {*self.saved[-self.config.keep :], best_step}
        removed = [step for step in self.saved if step not in kept]
        self.saved = [step for step in self.saved if step in kept]
        taken = snapshot.take(self)
        self._last_save = time.perf_counter()
        if taken is None:
            return
        root = self.folder / "checkpoints"
        try:
            self.sharding.publish(root, taken, self._writer, lambda: remove_checkpoints(root, removed))
        except OSError as error:
            raise TrainingError(self._unwritten(error)) from error

    def finish_saving(self) -> None:
        """Waits until the checkpoint in flight is on disk; raises TrainingError on all processes where it is not."""
        reason = ""
        try:
            self._writer.wait()
        except Exception as error:
            reason = self._unwritten(error)
        reason = self.runtime.from_main(reason)
        if reason:
            raise TrainingError(reason)

    def let_writer_finish(self) -> None:
        """Waits for a checkpoint in flight where the run ends for another reason, so that the resume has it."""
        with contextlib.suppress(Exception):
            self._writer.wait()

    def _unwritten(self, error: Exception) -> str:
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        return f"step {self.step}: checkpoint in {self.folder} could not be written ({why}); earlier ones are kept"

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Puts everything back as it was when `saved` was written; raises DamagedCheckpoint where it does not fit."""
        snapshot.restore(self, saved)
        left = (self.recipe.epochs - self.epoch) * self.feed.steps_per_epoch - self.batch
        self.total_steps = self.step + max(0, left)
        self.last_step = min(self.total_steps, self.config.max_steps or self.total_steps)
        if self._is_patience_over():
            self._stop_early()

    def _judge(self) -> bool:
        """Keeps the best scores, and stops where they have long not become better; says whether these are the best."""
        recipe = self.recipe
        if recipe.best is None:
            return False
        if recipe.best not in self.scores:
            raise UserError(f"--best {recipe.best}: no such score; there is {', '.join(self.scores)}")
        score = self.scores[recipe.best]
        sign = 1 if recipe.best_direction() == "highest" else -1
        known = self.best["scores"][recipe.best] if self.best else -sign * math.inf
        if sign * score > sign * known:  # never where the score is not a number
            self.best = {"step": self.step, "scores": self.scores}
            self.evaluations_since_best = 0
            return True
        self.evaluations_since_best += 1
        if self._is_patience_over():
            self._stop_early()
            self.tracker.say(self.stopped_early)
        return False

    def _stop_early(self) -> None:
        since = f"step {self.best['step']:,}" if self.best else "the beginning"
        self.stopped_early = (
            f"stopped early: {self.recipe.best} has not improved in {self.recipe.patience} evaluations since {since}"
        )
        self.stopping = True

    def _is_patience_over(self) -> bool:
        return self.recipe.patience is not None and self.evaluations_since_best >= self.recipe.patience

    def _check_best(self, best: str) -> None:
        """Raises UserError where no score can have that name; of a `score` of the recipe's own an evaluation tells."""
        sets = self.data.sets_in_training()
        of_recipe = type(self.recipe).score
        scores = {Recipe.score: ["loss"], Classifier.score: ["loss", "accuracy"]}.get(of_recipe)
        set_name, _, score = best.partition("/")
        if set_name not in sets or not score or (scores is not None and score not in scores):
            names = ", ".join(f"{name}/{score}" for name in sets for score in scores or ["..."])
            if set_name in self.data.sets_at_end():
                raise UserError(f"--best {best}: the test set waits for the end; choose by the validation set: {names}")
            raise UserError(f"--best {best}: no such score; there is {names}")
        self.recipe.best_direction()

    def _stop_for_non_finite_loss(self) -> None:
        """Finds the first step whose loss is not finite, and whose examples they were, on any process."""
        found: list[Any] = [None, []]
        for step, (epoch, batch, losses) in enumerate(self._pending, self.step - len(self._pending) + 1):
            if not losses:  # no objective was due
                continue
            values = [
                torch.cat([x.values if isinstance(x, Weighted) else x for x in parts]) for parts in losses.values()
            ]
            bad = (~torch.isfinite(torch.stack(values)).all(0)).nonzero().flatten().cpu()
            if len(bad):
                found = [step, self.feed.local_numbers(epoch, batch)[bad].tolist()]
                break
        everywhere = [f for f in self.runtime.gather_objects(found) if f[0] is not None]
        if not everywhere:
            return  # nothing is wrong with any loss, but no part of them weighs: their mean is undefined
        step = min(number for number, _ in everywhere)
        examples = sorted(e for number, numbers in everywhere if number == step for e in numbers)
        shown = ", ".join(map(str, examples[:8])) + (f" and {len(examples) - 8} more" if len(examples) > 8 else "")
        raise TrainingError(
            f"the loss is not finite at step {step} of {self.total_steps}, training example{'s' * (len(examples) > 1)} "
            f"{shown}; try a lower --lr, or --clip-norm 1, or look at those examples"
        )

    def _where(self) -> Record:
        return {"step": self.step, "epoch": round(self.step / self.feed.steps_per_epoch, 4)}

    def _shown(self, rate: float) -> dict[str, str]:
        shown = {"ex/s": f"{rate:,.0f}"}
        name = self.recipe.best or next((n for n in self.scores if not n.endswith("loss")), None)
        if name not in self.scores:
            return shown
        short = name.rpartition("/")[2]
        return {name if short == "loss" else short: f"{self.scores[name]:.4g}", **shown}  # "loss" is the training's


def goes_on(recipe: Recipe, config: RunConfig) -> bool:
    """Whether a run has a checkpoint that it goes on from, so that it needs no weights to begin with."""
    if config.run is None or config.check or config.find_lr or config.find_batch:
        return False
    return bool(
        checkpoint.checkpoints_in(Path(config.runs_dir).expanduser() / recipe.name / config.run / "checkpoints")
    )


def evaluation_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Optimizer steps between two evaluations; raises UserError where the recipe's field says no such thing."""
    steps = Interval.parse(recipe.evaluate_every, "--evaluate-every").in_steps(steps_per_epoch)
    if steps is None:
        raise UserError(f"--evaluate-every {recipe.evaluate_every!r}: must be in steps or epochs, so that runs agree")
    return steps


def remove_checkpoints(root: Path, steps: list[int]) -> None:
    """Removes checkpoints that are no longer kept."""
    for step in steps:
        shutil.rmtree(root / checkpoint.folder_name(step), ignore_errors=True)
