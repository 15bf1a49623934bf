"""The shared loop: fetch, forward, backward, step, log, evaluate, save. Every recipe is trained by it."""

from __future__ import annotations

import contextlib
import errno
import math
import shutil
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import checkpoint, evaluation, state
from .average import average_of
from .blocks import recompute_activations
from .config import Interval, RunConfig
from .data import Data, Feed, GlobalBatch
from .engines import engine_called
from .errors import Preempted, TrainingError, UserError, remedy_for_memory
from .evaluation import evaluating
from .fields import comparable
from .fsdp import FullyShard, sharding_called
from .memory import MicroBatches
from .metrics import Means, Output, Weighted
from .optimizers import make_optimizer, without_compiler
from .recipe import Recipe
from .runtime import Runtime
from .step import Losses
from .tracking import NullTracker, Record


class _Taken(NamedTuple):
    """Steps whose losses no record holds yet: which batches they were, and the losses."""

    epoch: int
    first: int
    size: int
    steps: int
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
        if not goes_on(recipe, config):
            recipe.initial_weights(networks)
        if config.checkpoint_activations and not sum(map(recompute_activations, networks.values())):
            raise UserError(
                f"--checkpoint-activations: recipe {recipe.name} has no stack of repeated blocks; leave the flag out"
            )
        self.networks = {name: self.sharding.place(network) for name, network in networks.items()}
        del networks  # where they are split, the whole ones must go
        self.optimizers = {name: make_optimizer(recipe, name, net) for name, net in self.networks.items()}
        divided, recomputed = self.sharding.divided, config.checkpoint_activations
        engine = engine_called(config.engine, runtime, divided=divided, recomputed=recomputed)
        self.engine = engine(recipe, self.data, self.networks, self.optimizers, runtime, config.seed)
        self.average = average_of(self.networks, recipe.ema_decay)
        self.micro_batches = MicroBatches(self.engine, self.feed, runtime)
        self.micro_batches.prepare()
        self.engine.say = lambda line: self.tracker.say(line)
        self.tracker: NullTracker = NullTracker()
        self.folder = Path()
        self.epoch, self.batch, self.step = 0, 0, 0  # the next batch, and the optimizer steps done
        self.scores: dict[str, float] = {}
        self.best: dict[str, Any] | None = None
        self.evaluations_since_best = 0
        self.stopping = False
        self.stopped_early = ""  # why, where the training ended before its last step
        self.signal: int | None = None
        self.on_evaluation: Callable[[], None] = lambda: None
        self.began = time.perf_counter()
        self.found: tuple[dict[str, Any], dict[str, torch.Tensor]] = ({}, {})  # what run.json keeps of the recipe
        self.launch = 0  # which launch of the run this is, once run.json has it
        self.saved: list[int] = []  # steps of the checkpoints that this run has written and not removed
        self._writer = checkpoint.Writer()
        self._pending: list[_Taken] = []
        self._window = Means()
        self._examples = self._timed_examples = 0  # since the last record, and of these, by this process
        self._mark = self._last_save = time.perf_counter()
        self._next_agreement = 0
        self._agreed_at = (0, 0.0)
        if recipe.best is not None:
            self._check_best_is_a_score(recipe.best)
        # From here on randomness is dropout's: one stream per process
        runtime.seed(config.seed, rank=runtime.rank)

    def fit(self) -> None:
        """Trains from the present position to the end, early stopping, `--max-steps` or a signal."""
        for network in self.networks.values():
            network.train()
        self._mark = self._last_save = time.perf_counter()
        self._next_agreement = self.step + 1
        while self.step < self.last_step and not self.stopping:
            for batch in self.feed.epoch(self.epoch, self.batch, self.at_once):
                if not self.take_step(batch):
                    break  # the feed now gives it in smaller micro-batches
                if self.step == self.last_step or self.step % self.evaluate_every == 0:
                    self.evaluate()
                if self.save_steps and self.step % self.save_steps == 0:
                    self.save()
                if self.step >= self._next_agreement or (self.signal and self.runtime.world_size == 1):
                    self.agree()
                if self.stopping or self.step == self.last_step:
                    break
        self.save()
        self.finish_saving()

    @cached_property
    def fingerprint(self) -> str:
        """By which a run that goes on knows its training examples."""
        return self.data.train.fingerprint()

    def at_once(self, room: int) -> int:
        """How many steps to take together, of the next `room`, so that all that is due after a step can be done."""
        if self.engine.at_once(room) == 1 or self.recipe.ema_decay is not None:  # an average is taken after each step
            return 1
        intervals = [self.log_every, self.evaluate_every, *([self.save_steps] if self.save_steps else [])]
        room = min(room, self.last_step - self.step, *(every - self.step % every for every in intervals))
        return self.engine.at_once(room)

    def take_step(self, batch: GlobalBatch) -> bool:
        """One optimizer step, or several where the engine wants them together; False where memory was short for it.

        The losses stay on the device, where nothing waits for them before the next record.
        """
        self.engine.set_lr([self.recipe.lr_factor(self.step + n, self.total_steps) for n in range(batch.steps)])
        losses = self.micro_batches.take(batch)
        if losses is None:
            return False
        self.step += batch.steps
        last = batch.index + batch.steps == self.feed.steps_per_epoch
        self.epoch, self.batch = (batch.epoch + 1, 0) if last else (batch.epoch, batch.index + batch.steps)
        self.average.update(self.step)
        self.tracker.advance(batch.steps)
        self._pending.append(_Taken(batch.epoch, batch.index, batch.size, batch.steps, losses))
        for name, norm in self.engine.norms.items():
            finite_norm = norm.isfinite()  # the scaler of fp16 skips a step whose gradient overflows
            self._window.add(f"gradient_norm/{name}", Weighted(norm.where(finite_norm, 0.0), finite_norm))
        self._examples += batch.size * batch.steps
        self._timed_examples += batch.size * batch.steps
        if self.step % self.log_every == 0:
            self.log()
        return True

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
        if not self._examples:
            return
        reduced = self._gather_losses()
        named = {}
        for name in self.engine.objectives:
            mean, count = reduced.pop(name)
            assert count == self._examples, f"{count} losses of {name!r} for {self._examples} examples"
            named["train/loss" if name == "model" else f"train/loss/{name}"] = mean
        norms = {name.removesuffix("/model"): mean for name, (mean, _) in reduced.items()}
        rate = self._timed_examples / max(1e-9, time.perf_counter() - self._mark)
        name, *_ = self.optimizers
        lr = self.engine.base_lrs[name][0] * self.recipe.lr_factor(self.step - 1, self.total_steps)
        self.tracker.log({**self._where(), **named, "lr": lr, **norms, "examples_per_second": round(rate, 1)})
        self.tracker.show(**{name.removeprefix("train/"): f"{v:.4g}" for name, v in named.items()}, **self._shown(rate))
        self._window = Means()
        self._examples = self._timed_examples = 0
        self._mark = time.perf_counter()

    def _gather_losses(self) -> dict[str, tuple[float, int]]:
        """Adds the pending losses to the window of the next record, and gives its means and counts so far."""
        for name in self.engine.objectives:
            for *_, losses in self._pending:
                for loss in losses[name]:
                    self._window.add(name, loss)
        reduced = self._window.reduce(self.runtime.sum, self.runtime.device)
        if not all(math.isfinite(reduced[name][0]) or not reduced[name][1] for name in self.engine.objectives):
            self._stop_for_non_finite_loss()
        self._pending.clear()
        return reduced

    def evaluate(self) -> None:
        """Evaluates every set, records the scores, and decides whether they are the best so far."""
        self.log()
        self.tracker.activity("evaluating")
        # An evaluation may draw random numbers (a generator's noise): it must not move the training's
        size = self.config.eval_batch_size
        remedy = remedy_for_memory(self.runtime.rank, "an evaluation", f"give --eval-batch-size {-(-size // 2)}")
        with self.average.applied(), forked_random_state(self.runtime, self.config.seed), remedy:
            evaluated = evaluation.evaluate_all(self.recipe, self.networks, self.data, self.runtime, size)
            self.scores, self.tracker.history.outputs = evaluated.scores, evaluated.outputs
            if type(self.recipe).snapshot is not Recipe.snapshot:
                networks = self.sharding.whole(self.networks, self.recipe.networks)
                if networks is not None:
                    with evaluating(networks):
                        snapshot = self.recipe.snapshot(networks, self.data)
                    if snapshot:
                        self.tracker.keep_snapshot(self.step, checkpoint.plain(snapshot))
        self.tracker.log({**self._where(), **self.scores, "data": self.data.source})
        epoch = f"epoch {self._where()['epoch']:g}/{self.recipe.epochs}"
        self.tracker.say(f"{epoch}  step {self.step:,}  {text_of(self.scores)}  ({self.data.source})")
        self.tracker.activity("")
        self._judge()
        self.on_evaluation()
        self._mark = time.perf_counter()

    def save(self) -> None:
        """Publishes a checkpoint of the present state; all processes take part. In the background, unless divided.

        Of those that this run wrote, the newest `--keep` and the best stay. Raises TrainingError on all processes where
        an earlier one could not be written, or this one in the foreground.
        """
        if self.step in self.saved:
            return
        if self._examples:
            self._gather_losses()  # a state whose loss is not finite is never saved
        self.finish_saving()
        random_tensors, random_rest = state.random_state(self.runtime.device)
        everyones = self.runtime.gather_bytes(state.pack(random_tensors))
        ranks = self.runtime.gather_objects({"random": random_rest, "window": self._window.state()})
        self.saved.append(self.step)
        best_step = self.best["step"] if self.best else None
        kept = {*self.saved[-self.config.keep :], best_step}
        removed = [step for step in self.saved if step not in kept]
        self.saved = [step for step in self.saved if step in kept]
        self._last_save = time.perf_counter()
        if not (self.runtime.is_main or self.sharding.divided):
            return
        tensors = {"model.safetensors": checkpoint.network_tensors(self._network_states())}
        if (average := self.average.state()) is not None:
            tensors["ema.safetensors"] = checkpoint.network_tensors(average)
        tensors["optimizer.safetensors"], optimizer_rest = state.optimizer_state(self.optimizers, self.networks)
        generators = {
            f"{rank}/{name}": tensor
            for rank, packed in enumerate(everyones)
            for name, tensor in state.unpack(packed, random_tensors).items()
        }
        scaler = self.runtime.scaler
        rest = {
            "epoch": self.epoch,
            "batch": self.batch,
            "batch_size": self.recipe.batch_size,
            "accumulate": self.micro_batches.state(),
            "examples_in_window": self._examples,
            "scores": finite(self.scores),
            "best": finite(self.best),
            "evaluations_since_best": self.evaluations_since_best,
            "saved": self.saved,
            "metrics_bytes": self.tracker.sync(),
            "optimizer": optimizer_rest,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "ranks": ranks,
            "world_size": self.runtime.world_size,
            "shard": self.config.shard,
            "sums": self.runtime.sums,
            "threads": self.runtime.threads,
            "device": self.runtime.describe(),
            "fields": self.recipe.fields(),
            "source_sha256": self.recipe.source_hash(),
            "data": self.data.source,
            "torch": torch.__version__,
        }
        root, random_file = self.folder / "checkpoints", {"random.safetensors": generators}
        if isinstance(self.sharding, FullyShard):
            try:
                self.sharding.publish(root, self.step, tensors, random_file, rest)
            except OSError as error:
                raise TrainingError(self._unwritten(error)) from error
            if self.runtime.is_main:
                remove_checkpoints(root, removed)
            return
        copied = {file: checkpoint.plain(values) for file, values in (tensors | random_file).items()}
        what = checkpoint.Checkpoint(self.step, copied, rest)

        def publish() -> None:
            path = checkpoint.publish(root, what)
            try:
                checkpoint.read(path, checkpoint.nothing)
            except checkpoint.DamagedCheckpoint as damage:
                raise OSError(errno.EIO, f"read back damaged: {damage}") from damage
            remove_checkpoints(root, removed)  # only now that a newer one is safe

        self._writer.submit(publish)

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

    def _unwritten(self, error: Exception) -> str:
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        return f"step {self.step}: checkpoint in {self.folder} could not be written ({why}); earlier ones are kept"

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Puts everything back as it was when `saved` was written; raises DamagedCheckpoint where it does not fit.

        On another number of processes the order of the data goes on from the same example, and dropout is seeded anew
        from (seed, step, rank).
        """
        rest, runtime = saved.state, self.runtime
        checkpoint.load_networks(self.networks, saved.tensors["model.safetensors"])
        if "ema.safetensors" in saved.tensors:
            self.average.load(saved.tensors["ema.safetensors"])
        else:
            self.average.begin()  # the average was asked for after the run began
        with without_compiler():
            state.load_optimizers(
                self.optimizers,
                self.networks,
                saved.tensors["optimizer.safetensors"],
                rest["optimizer"],
                # where a field was changed on purpose, the recipe's present momentum, weight decay, ... hold
                groups_too=comparable(rest["fields"]) == comparable(self.recipe.fields()),
            )
        if runtime.scaler is not None and rest["scaler"] is not None:
            runtime.scaler.load_state_dict(rest["scaler"])
        self.micro_batches.restore(rest.get("accumulate", {}), rest["world_size"])
        self.step, self.epoch = saved.step, rest["epoch"]
        self.batch = rest["batch"] * rest["batch_size"] // self.recipe.batch_size
        left = (self.recipe.epochs - self.epoch) * self.feed.steps_per_epoch - self.batch
        self.total_steps = self.step + max(0, left)
        self.last_step = min(self.total_steps, self.config.max_steps or self.total_steps)
        self.scores, self.best = known(rest["scores"]), known(rest["best"])
        self.evaluations_since_best = rest["evaluations_since_best"]
        if self._is_patience_over():
            self._stop_early()
        self.saved = rest["saved"]
        self._examples = rest["examples_in_window"]
        windows = [Means.from_state(rank["window"], runtime.device) for rank in rest["ranks"]]
        if rest["world_size"] == runtime.world_size:
            self._window = windows[runtime.rank]
            prefix = f"{runtime.rank}/"
            own = {n.removeprefix(prefix): t for n, t in saved.tensors["random.safetensors"].items()}
            own = {n: t for n, t in own.items() if "/" not in n}
            state.set_random_state(own, rest["ranks"][runtime.rank]["random"], runtime.device)
        else:
            runtime.seed(self.config.seed, step=self.step, rank=runtime.rank)
            self._window = Means()
            for number, window in enumerate(windows):
                self._window.merge(window, counted=number % runtime.world_size == runtime.rank)

    def _network_states(self) -> dict[str, dict[str, torch.Tensor]]:
        return {name: network.state_dict() for name, network in self.networks.items()}

    def _judge(self) -> None:
        recipe = self.recipe
        if recipe.best is None:
            return
        score = self.scores[recipe.best]
        sign = 1 if recipe.best_direction() == "highest" else -1
        known = self.best["scores"][recipe.best] if self.best else -sign * math.inf
        if sign * score > sign * known:  # never where the score is not a number
            self.best = {"step": self.step, "scores": self.scores}
            self.evaluations_since_best = 0
            self.save()
            return
        self.evaluations_since_best += 1
        if self._is_patience_over():
            self._stop_early()
            self.tracker.say(self.stopped_early)

    def _stop_early(self) -> None:
        since = f"step {self.best['step']:,}" if self.best else "the beginning"
        self.stopped_early = (
            f"stopped early: {self.recipe.best} has not improved in {self.recipe.patience} evaluations since {since}"
        )
        self.stopping = True

    def _is_patience_over(self) -> bool:
        return self.recipe.patience is not None and self.evaluations_since_best >= self.recipe.patience

    def _check_best_is_a_score(self, best: str) -> None:
        names = []
        with evaluating(self.networks), self.runtime.autocast():
            for set_name, examples in self.data.evaluation_sets().items():
                scores = self.recipe.score(self.networks, self.data.inputs(examples, 0, 1))
                names += [f"{set_name}/{score}" for score, values in scores.items() if not isinstance(values, Output)]
        if best not in names:
            raise UserError(f"--best {best}: no such score; there is {', '.join(names)}")
        self.recipe.best_direction()

    def _stop_for_non_finite_loss(self) -> None:
        """Finds the first step whose loss is not finite, and whose examples they were, on any process."""
        found: list[Any] = [None, []]
        done = self.step - sum(taken.steps for taken in self._pending)
        for epoch, batch, size, steps, losses in self._pending:
            values = [
                torch.cat([x.values if isinstance(x, Weighted) else x for x in parts]) for parts in losses.values()
            ]
            bad = (~torch.isfinite(torch.stack(values)).all(0)).nonzero().flatten().cpu()
            if len(bad):
                first = int(bad[0]) // size if steps > 1 else 0  # of the steps taken together
                bad = bad[bad < (first + 1) * size] - first * size
                found = [done + first + 1, self.feed.local_numbers(epoch, batch + first)[bad].tolist()]
                break
            done += steps
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
    return bool(checkpoint.listed(Path(config.runs_dir).expanduser() / recipe.name / config.run / "checkpoints"))


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


def text_of(scores: dict[str, float]) -> str:
    """Scores for a person."""
    return "  ".join(f"{name} {value:.5g}" for name, value in scores.items())


def finite(value: Any) -> Any:
    """A copy in which what JSON can't hold (nan, inf) is null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def known(value: Any) -> Any:
    """What `finite` was given, as far as it can be told: null is nan again."""
    if isinstance(value, dict):
        return {key: math.nan if item is None else known(item) for key, item in value.items()}
    return value


@contextlib.contextmanager
def forked_random_state(runtime: Runtime, seed: int) -> Iterator[None]:
    """Within it torch's generators are seeded for an evaluation; afterwards they are as they were."""
    devices = [runtime.device] if runtime.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
