"""The shared loop that trains every recipe: fetch a batch, take a step, record, evaluate, save.

`Trainer.fit` is the loop and `step.Step` the step; read these first.
"""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any

import torch

from .. import machine
from ..config import Interval, RunConfig
from ..data.feed import Feed, GlobalBatch
from ..data.sets import Data, ExampleSet
from ..distributed.runtime import Runtime, on_or_off
from ..distributed.timing import Pace
from ..distributed.watch import Watch
from ..errors import Preempted, UserError, remedy_for_memory
from ..metrics import text_of
from ..recipe.contract import Networks, Recipe
from ..runs import checkpoint, fingerprints, network_state, optimizer_state
from ..runs.python_state import PythonState
from ..runs.python_undo import unnoticed_reading
from ..runs.storage import NoStorage
from ..runs.tracking import NullTracker, Record
from . import evaluation, sharing, snapshot
from .best import Best
from .carried import noting_in_first_step
from .compiling import compiled_if_asked
from .ema import average_of
from .epoch_watch import EpochWatch
from .evaluation import evaluating, forked_random_state
from .fine_tuning import FineTuning
from .learning_rates import LearningRates
from .losses import LossWindow
from .micro_batches import MicroBatches
from .network_inputs import Inputs, noting
from .networks import (
    check_embeddings,
    check_gradient_hooks,
    is_channels_last,
    modes_of,
    prepare_networks,
    set_modes,
    warnings_of,
)
from .optimizers import KeptOptimizers, make_optimizer
from .profiling import Profile
from .recheck import recheck_of
from .saving import Saving
from .sharding import sharding_called
from .step import Step
from .stopping import Deadline
from .wrapped_steps import DDPStep, ShardedStep

TIME_IS_UP = 1000
"""In place of a signal's number: the run's time is over."""


class Trainer:
    """One run: the training state and the loop."""

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
        self.epochs = recipe.epochs  # as given: hooks may change the recipe's
        self.total_steps = self.epochs * self.feed.steps_per_epoch
        self.last_step = min(self.total_steps, config.max_steps or self.total_steps)
        self.log_every = config.log_every or max(1, min(50, self.last_step // 100))
        self.evaluate_every = evaluation_steps(recipe, self.feed.steps_per_epoch)
        # The position in the training: the next batch, the optimizer steps taken, and their results
        self.epoch, self.batch, self.step = 0, 0, 0
        self.scores: dict[str, float] = {}
        self.best = Best(recipe, self.data)
        self.tested: int | None = None  # step of the weights tested at the end, if there is a validation set
        self.signal: int | None = None  # the one that asked the run to stop
        self.tracker: NullTracker = NullTracker()
        self.folder = Path()
        self.storage = NoStorage()
        self.status = "failed"  # unless it ends otherwise
        self.inputs: Inputs = {}  # what the networks are called with
        self.baseline: dict[str, Any] = {}  # the run that this one is compared with
        self.on_evaluation: Callable[[], None] = lambda: None
        # What is trained
        runtime.seed(config.seed)
        self.sharding = sharding_called(config.shard, runtime)
        networks = recipe.networks()
        self._modes = modes_of(networks)
        for network in networks.values():
            network.train()
        self.fields = recipe.fields()  # as given: hooks may change them, which is Python state
        # before initial weights, which a resumed run skips
        self.python_state = PythonState(recipe, networks, functions=self.data.given())
        self.initial = prepare_networks(networks, recipe, config, runtime, self.data, self.feed, self.python_state)
        self.python_state.made_once()
        self.channels_last = is_channels_last(config.channels_last, recipe)
        self.networks = {
            name: self.sharding.place(network, channels_last=self.channels_last) for name, network in networks.items()
        }
        del networks  # if sharded, free the full ones
        self.fine_tuning = FineTuning(recipe, config, self.networks, self.feed.steps_per_epoch)
        made = {name: make_optimizer(recipe, name, net) for name, net in self.networks.items()}
        self.optimizers = {name: self.fine_tuning.with_rates(name, optimizer) for name, optimizer in made.items()}
        self.fine_tuning.begin(self.optimizers)
        self.kept_optimizers = KeptOptimizers(recipe, self.networks, self.optimizers)
        self.rates = LearningRates(recipe, self.optimizers, self.total_steps, self.fine_tuning.origins)
        self.lr = self.rates.first  # of the last step
        step = ShardedStep if self.sharding.is_sharded else DDPStep if config.gradient_sync == "ddp" else Step
        self.optimizer_step: Step = step(recipe, self.data, self.networks, self.optimizers, runtime, config.seed)
        self.timing = self.optimizer_step.timing
        self.pace = Pace(runtime.rank, runtime.world_size, runtime.device, runtime.sum)
        self.watch = Watch(self.timing, runtime.rank, runtime.world_size, runtime.store, config.timeout_seconds)
        self.usage = machine.Usage()
        self.deadline = Deadline(config.time)
        self.profile = Profile(config.profile, config.profile_ranks, runtime.rank)
        self.optimizer_step.is_channels_last = self.channels_last
        self.optimizer_step.compiled = compiled_if_asked(config.compile, self.networks, runtime, config.shard)
        self.average = average_of(self.networks, recipe.ema_decay)
        self.recheck = self.optimizer_step.recheck = recheck_of(config.recheck_every, self)
        # What supports the loop
        self.micro_batches = MicroBatches(self.optimizer_step, self.feed, runtime, lambda line: self.tracker.say(line))
        self.window = LossWindow(self.optimizer_step.objectives, self.feed, runtime)
        self.saving = Saving(self, config, self.feed.steps_per_epoch)
        self.epoch_watch = EpochWatch(self)
        self.began = time.perf_counter()
        self.problem = ""  # why the run failed or was stopped
        self.hosts = [platform.node()]  # of the processes, by rank
        self.described: dict[str, Any] = {}  # run.json as this launch last wrote it
        self.found: tuple[dict[str, Any], dict[str, torch.Tensor]] = ({}, {})  # what run.json keeps of the recipe
        self.names = {name: set(network_state.own_tensors(net)) for name, net in self.networks.items()}
        self._parameters = {name: dict(net.named_parameters()) for name, net in self.networks.items()}
        self.noted_lost: set[str] = set()  # values that change in training and can't be saved: already reported
        self._noted_buffers: set[str] = set()
        self._first_step = True  # of this launch
        self._scored = False  # in this launch
        self._next_agreement = 0
        self._agreed_at = (0, 0.0)

    def check(self) -> None:
        """Raises UserError before the first step for what can't be trained or saved; collects the plan's notes."""
        self.set_modes()  # making the optimizers or the step may have set evaluation mode
        check_gradient_hooks(self.networks, self.recipe, self.runtime, self.feed.accumulate)
        check_embeddings(self.networks, self.recipe, self.runtime, self.feed.accumulate)
        network_state.check_savable(self.networks)
        network_state.extra_states(self.networks)
        self.notes = [self.initial.note()] if self.initial else []
        self.notes += self.fine_tuning.notes()
        self.notes += self.optimizer_step.notes()
        self.notes += warnings_of(self.networks, self.recipe, self.runtime, self.feed)
        if expected := self.optimizer_step.buffer_sync.expected:
            self._noted_buffers.update(expected)
            self.notes.append(averaged_buffers(expected))

    def set_modes(self) -> None:
        """Puts the networks that have an objective in training mode; the others keep the mode that networks() gave."""
        set_modes(self.networks, self.optimizer_step.objectives, self._modes)

    def check_parameters(self) -> None:
        """Raises UserError for parameters that the networks have gained or replaced, or that are not theirs."""
        trained = {
            name: [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for name, optimizer in self.optimizers.items()
        }
        network_state.check_names(self.networks, self.names)
        network_state.check_replaced(self.networks, self._parameters, trained)
        optimizer_state.check_parameters(self.optimizers, self.networks)

    def begin(self) -> None:
        """Prepares the first step; afterwards a checkpoint may be restored."""
        self.check()
        self.hosts = self.runtime.gather_objects(platform.node())
        self.python_state.networks, self.python_state.optimizers = self.networks, self.optimizers
        losses = {f"objectives[{name!r}]": one for name, one in self.optimizer_step.objectives.items()}
        self.python_state.functions = {**self.python_state.functions, **losses, **self.rates.functions()}
        self.python_state.begin()
        optimizer_state.begin(self.optimizers, self.networks)
        self.optimizer_step.warm_up(self.feed.throwaway_batch)
        self.optimizer_step.buffer_sync.begin()
        self.recheck.check()
        # From here on random numbers are dropout's: one stream per process
        self.runtime.seed(self.config.seed, rank=self.runtime.rank)

    def fit(self) -> None:
        """Trains from the current position to the end, early stopping, `--max-steps` or a signal."""
        self.window.start_clock()
        self.saving.start_clock()
        self._next_agreement = self.step + 1
        if self.batch == 0:
            self.timing.begin_epoch()
        while self.step < self.last_step and not self.best.stopped:
            self.epoch_watch.begin()
            for batch in self.timing.fetched(self.feed.epoch(self.epoch, self.batch)):
                self.profile.before_step(self.step + 1)
                if not self.take_step(batch):
                    break  # the feed now delivers it in smaller micro-batches
                self.recipe.after_step(self.networks, self.step)
                self.write_profile(last=self.step == self.last_step)
                if self.batch == 0:
                    self.rates.after_epoch()
                    self.recipe.after_epoch(self.networks, self.epoch)
                    self._note_fields_without_effect()
                self.kept_optimizers.check(self.step)
                if self._is_evaluation_due():
                    self.evaluate()
                if self.saving.is_due_at(self.step):
                    self.saving.save()
                if self.step >= self._next_agreement or (self.signal and self.runtime.world_size == 1):
                    self.agree()
                if self.best.stopped or self.step == self.last_step:
                    break
        self.saving.save()
        if not self._is_evaluation_due() and not self.best.stopped:
            self.evaluate(counts=False)  # after the save: what it changes, a longer run would not have
        self.saving.wait()
        if self.data.sets_at_end():
            self.test()

    def _is_evaluation_due(self) -> bool:
        return self.step % self.evaluate_every == 0 or self.step == self.total_steps

    def write_profile(self, *, last: bool) -> None:
        """Writes the trace of `--profile` if its last step, or the run's, has been taken."""
        if written := self.profile.after_step(self.step, self.folder, last=last):
            self.tracker.say(f"profile  {written}")

    def take_step(self, batch: GlobalBatch) -> bool:
        """Takes one optimizer step; False if it ran out of memory and was undone.

        The losses stay on the device: nothing waits for them before the next record.
        """
        began = time.perf_counter()
        self.rates.before_step(self.step, self.total_steps)
        self.fine_tuning.before_step(self.step)
        self.recheck.before_step(self.step + 1)
        noting = noting_in_first_step(self) if self._first_step else contextlib.nullcontext()
        with self.micro_batches.attempt(), noting:
            losses = self.optimizer_step(batch, self.recipe.objectives_of_step(self.step))
        if self.micro_batches.is_short:
            self.micro_batches.retry_smaller()
            return False
        self.lr = self.rates.first
        self.rates.after_step()
        self.step += 1
        self.timing.stepped()
        last = batch.index + 1 == self.feed.steps_per_epoch
        self.epoch, self.batch = (batch.epoch + 1, 0) if last else (batch.epoch, batch.index + 1)
        if last:
            self.timing.end_epoch()
        self.average.update(self.step)
        self.window.add(batch, losses, self.optimizer_step.norms)
        self.tracker.advance(1)
        if self._first_step:  # the optimizers have their states now, on all processes: raises if one can't be saved
            self._first_step = False
            self.check_parameters()
            optimizer_state.optimizer_state(self.optimizers, self.networks)
            if self.optimizer_step.compiled.is_compiled:
                seconds = time.perf_counter() - began
                self.tracker.say(f"compiled in the first step, {seconds:.1f} s; a batch of another size compiles again")
                self.window.start_clock()
        if not self._noted_buffers.issuperset(self.optimizer_step.buffer_sync.changed):
            self._note_buffers()
        if self.step % self.log_every == 0:
            self.log()
        if self.config.fingerprint_every and self.step % self.config.fingerprint_every == 0:
            self._record_fingerprint()
        return True

    def log(self) -> None:
        """Records the exact mean loss since the last record; raises TrainingError if it is not finite."""
        if not self.window.examples:
            return
        values = self.window.record(self.step, self.total_steps)
        losses = {name: value for name, value in values.items() if name.startswith("train/")}
        norms = {name: value for name, value in values.items() if name not in losses}
        rate = self.window.examples_per_second
        speed = {} if rate is None else {"examples_per_second": round(rate, 1)}
        times = {**speed, **self.timing.take_epochs(), **self.pace.record(self.timing)}
        usage = self.usage.figures() if self.runtime.is_main else {}
        self.tracker.log({**self._where(), **losses, "lr": self.lr, **norms, **times, **usage})
        self.tracker.show(
            **{name.removeprefix("train/"): f"{v:.4g}" for name, v in losses.items()}, **self._shown(rate)
        )
        self.window.begin()

    def _record_fingerprint(self) -> None:
        """Records a hash of the weights."""
        if self.runtime.is_main or self.sharding.is_sharded:
            number = fingerprints.of_run(self.networks, self.runtime)
            self.tracker.log({**self._where(), fingerprints.NAME: number})

    def evaluate(self, *, counts: bool = True) -> None:
        """Evaluates the sets scored during training, records the scores, and judges whether they are the best.

        counts: False if --max-steps ends the run between two evaluations.
        """
        self.log()
        self.tracker.activity("evaluating")
        self.timing.enter("evaluation")
        with self._evaluating():
            self.scores = self._scores_of(self.data.sets_in_training())
            self._keep_snapshot()
        self._record(f"epoch {self._where()['epoch']:g}/{self.epochs}  step {self.step:,}", self.scores)
        if counts:
            improved = self.best.judge(self.step, self.scores)
            if self.best.stopped:
                self.tracker.say(self.best.stopped)
            self.rates.after_evaluation(self.scores)
            self.recipe.after_evaluation(self.networks, self.scores)
            if improved:
                self.saving.save()
        self.on_evaluation()
        self.timing.enter("other")
        self.window.start_clock()

    def test(self) -> None:
        """Evaluates the sets scored only at the end, with the weights that the validation set chose.

        They are the best ones if the recipe names a score, else the last. The record comes after the last save, so a
        resumed run has not seen it.
        """
        self.tracker.activity("testing")
        self.timing.enter("evaluation")
        with self.chosen_weights() as step, self._evaluating():
            tested = self._scores_of(self.data.sets_at_end())
        self.tested = step
        best = self.best.record if self.best.record and self.best.record["step"] == self.tested else None
        which = "the best" if best else "the last"
        self._record(f"test with {which} weights, step {self.tested:,}", tested)
        self.scores = {**self.scores, **tested}
        if best:
            self.best.record = {**best, "scores": {**best["scores"], **tested}}
        self.on_evaluation()

    @contextlib.contextmanager
    def chosen_weights(self) -> Iterator[int]:
        """Context manager: the weights that are tested and drawn, and their step, on all processes.

        With a validation set they are the best ones if the recipe names a score; else the last.
        """
        chosen = self._best_checkpoint() if self.data.sets_at_end() else None
        with snapshot.put_in(self, chosen) if chosen is not None else contextlib.nullcontext():
            yield self.step if chosen is None else chosen.step

    def _best_checkpoint(self) -> checkpoint.Checkpoint | None:
        """The best weights, on all processes; None if they are the current ones or can't be read, which is reported."""
        if self.best.record is None or self.best.record["step"] == self.step:
            return None
        found, problem = None, ""
        try:
            path = self.folder / "checkpoints" / checkpoint.folder_name(self.best.record["step"])
            found = sharing.read(self.runtime, self.sharding, path, self.networks)
        except checkpoint.DamagedCheckpoint as damage:
            problem = str(damage)
        problem = next(filter(None, self.runtime.gather_objects(problem)), "")
        if problem:
            self.tracker.say(f"the best weights can't be read ({problem}): the last ones are tested")
        return None if problem else found

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Context manager: averaged weights if there is an EMA; the training's random state is not changed."""
        size = self.config.eval_batch_size
        remedy = remedy_for_memory(self.runtime.rank, "an evaluation", f"give --eval-batch-size {-(-size // 2)}")
        with self.average.applied(), forked_random_state(self.runtime, self.config.seed), remedy:
            yield

    def _scores_of(self, sets: Mapping[str, ExampleSet]) -> dict[str, float]:
        with noting(self.networks, self.inputs) if not self.inputs else contextlib.nullcontext():
            size, seed = self.config.eval_batch_size, self.config.seed
            notes: list[str] | None = None if self._scored else []
            result = evaluation.evaluate_all(
                self.recipe, self.networks, self.data, sets, self.runtime, size, seed=seed, notes=notes
            )
        self._scored = True
        for note in dict.fromkeys(notes or []):
            self.tracker.say(f"note     {note}")
        self.tracker.history.outputs = result.outputs
        return result.scores

    def _record(self, when: str, scores: dict[str, float]) -> None:
        self.tracker.log({**self._where(), **scores, "data": self.data.source})
        self.tracker.say(f"{when}  {text_of(scores)}  ({self.data.source})")
        self.tracker.activity("")

    def _keep_snapshot(self) -> None:
        """Calls the recipe's snapshot(), on all processes since it may change the recipe, and keeps the result."""
        if type(self.recipe).snapshot is Recipe.snapshot:
            return
        networks: Networks | None = self.networks
        if self.sharding.is_sharded:
            networks = self.sharding.whole(self.networks, self.recipe.networks)
        if networks is None:
            return
        with evaluating(networks):
            kept = self.recipe.snapshot(networks, self.data)
        if kept and self.runtime.is_main:
            self.tracker.keep_snapshot(self.step, checkpoint.plain(kept))

    def agree(self) -> None:
        """Lets all processes act on what one of them knows: a signal, or that it is time to save.

        One small collective about once a second, at steps derived from the slowest process's clock.
        Raises Preempted, after saving, if a signal asked any of them to stop.
        """
        self.runtime.alive()
        now = time.perf_counter()
        step, then = self._agreed_at
        per_step = (now - then) / (self.step - step) if then else 1.0
        due = self.saving.is_due_by_time()
        if not self.signal and self.deadline.has_come(self.saving.longest):
            self.ask_to_stop(TIME_IS_UP)
        signal, save, slowest = self.runtime.max([float(self.signal or 0), float(due), per_step])
        self._next_agreement = self.step + max(1, min(10_000, int(1.0 / max(slowest, 1e-6))))
        self._agreed_at = (self.step, time.perf_counter())
        if save or signal:
            self.saving.save()
        if signal:
            self.saving.wait()
            by, number = self.asked_by(int(signal))
            raise Preempted(number, f"stopped by {by} after step {self.step}; saved")

    def asked_by(self, signal: int) -> tuple[str, int]:
        """Who asked the run to stop, for a person, and the signal of its exit code: SIGTERM's if its time is over."""
        if signal == TIME_IS_UP:
            return self.deadline.source or "the time limit of another machine", int(SIGTERM)
        return "Ctrl-C" if signal == SIGINT else f"signal {signal}", signal

    def ask_to_stop(self, number: int) -> None:
        """Asks the run to save and stop after a step; number: of the signal."""
        self.signal = number

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Restores everything as it was when `saved` was written; raises DamagedCheckpoint if it does not fit."""
        snapshot.restore(self, saved)
        self.timing.step = self.step
        left = (self.epochs - self.epoch) * self.feed.steps_per_epoch - self.batch
        self.total_steps = self.step + max(0, left)
        self.last_step = min(self.total_steps, self.config.max_steps or self.total_steps)
        self.best.check_patience()

    def _note_fields_without_effect(self) -> None:
        """Reports once that the recipe has changed what is read at the start alone."""
        for name, value in (("batch_size", self.feed.batch_size), ("epochs", self.epochs)):
            if getattr(self.recipe, name) != value and name not in self.noted_lost:
                self.noted_lost.add(name)
                now = getattr(self.recipe, name)
                self.tracker.say(f"note     {name}: the recipe has changed it to {now!r}; it stays {value}")

    @property
    def kernels(self) -> dict[str, str]:
        """The settings that choose kernels and so the last bits; a resumed run notes those that have changed."""
        compiled = self.optimizer_step.compiled.is_compiled
        return {"compile": on_or_off(compiled), "channels-last": on_or_off(self.channels_last), **self.runtime.kernels}

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Identify the examples of each set to a resumed run."""
        with unnoticed_reading(self.recipe, self.data.given()):
            return self.data.fingerprints()

    def _note_buffers(self) -> None:
        """Reports once which buffers are averaged over the processes, unless the networks' code already showed it."""
        names = [name for name in self.optimizer_step.buffer_sync.changed if name not in self._noted_buffers]
        self._noted_buffers.update(names)
        self.tracker.say(f"note     {averaged_buffers(names)}")

    def _where(self) -> Record:
        return {"step": self.step, "epoch": round(self.step / self.feed.steps_per_epoch, 4)}

    def _shown(self, rate: float | None) -> dict[str, str]:
        shown = {} if rate is None else {"ex/s": f"{rate:,.0f}"}
        name = self.recipe.best or next((n for n in self.scores if not n.endswith("loss")), None)
        if name not in self.scores:
            return shown
        short = name.rpartition("/")[2]
        return {name if short == "loss" else short: f"{self.scores[name]:.4g}", **shown}  # "loss" is the training's


def averaged_buffers(names: Sequence[str]) -> str:
    """The note on what averaging these buffers means for results."""
    return (
        f"{', '.join(names)}: updated by the recipe's own code; it is averaged over the processes after each step, but "
        "a forward pass sees its own process's update only, so results may depend on the number of processes"
    )


def evaluation_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Optimizer steps between two evaluations; raises UserError if the recipe's field is not in steps or epochs."""
    steps = Interval.parse(recipe.evaluate_every, "--evaluate-every").in_steps(steps_per_epoch)
    if steps is None:
        raise UserError(f"--evaluate-every {recipe.evaluate_every!r}: must be in steps or epochs, so that runs agree")
    return steps
