"""The shared loop: fetch, forward, backward, step, log, evaluate, save. Every recipe is trained by it."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint, evaluation
from .config import Interval, RunConfig
from .data import Data, Feed, GlobalBatch
from .errors import TrainingError, UserError
from .evaluation import evaluating
from .metrics import Means
from .recipe import Recipe
from .runtime import Runtime
from .step import EagerStep, Losses, MovingAverage, NoAverage
from .tracking import NullTracker, Record


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
        runtime.seed(config.seed)
        self.networks = {name: runtime.place(network) for name, network in recipe.networks().items()}
        self.optimizers = {name: make_optimizer(recipe, name, net) for name, net in self.networks.items()}
        self.engine = EagerStep(recipe, self.data, self.networks, self.optimizers, runtime)
        self.average: MovingAverage | NoAverage = (
            MovingAverage(self.networks, recipe.ema_decay) if recipe.ema_decay is not None else NoAverage()
        )
        self.tracker: NullTracker = NullTracker()
        self.folder = Path()
        self.step = 0
        self.scores: dict[str, float] = {}
        self.best: dict[str, Any] | None = None
        self.evaluations_since_best = 0
        self.stopping = False
        self.written: dict[int, Path] = {}
        self._pending: list[tuple[int, int, Losses]] = []
        self._examples = 0
        self._mark = 0.0
        if recipe.best is not None:
            self._check_best_is_a_score(recipe.best)

    def fit(self) -> None:
        """Trains from the current position to the end, early stopping or `--max-steps`."""
        recipe, runtime = self.recipe, self.runtime
        runtime.seed(
            self.config.seed, rank=runtime.rank
        )  # from here on randomness is dropout's: one stream per process
        for network in self.networks.values():
            network.train()
        self._mark = time.perf_counter()
        for epoch in range(recipe.epochs):
            for batch in self.feed.epoch(epoch):
                self.take_step(batch)
                if self.step % self.evaluate_every == 0 or self.step == self.last_step:
                    self.evaluate()
                if self.stopping or self.step == self.last_step:
                    self.save()
                    return

    def take_step(self, batch: GlobalBatch) -> None:
        """One optimizer step; its losses stay on the device, where nothing waits for them before the next record."""
        self.engine.set_lr(self.recipe.lr_factor(self.step, self.total_steps))
        losses = self.engine(batch)
        self.step += 1
        self.average.update(self.step)
        self.tracker.advance()
        self._pending.append((batch.epoch, batch.index, losses))
        self._examples += batch.size
        if self.step % self.log_every == 0:
            self.log()

    def log(self) -> None:
        """Records the exact mean loss since the last record; raises TrainingError where it is not finite."""
        if not self._pending:
            return
        means = Means()
        for name in self.engine.objectives:
            for _, _, losses in self._pending:
                for loss in losses[name]:
                    means.add(name, evaluation.per_example(loss, len(loss), name))
        reduced = means.reduce(self.runtime.sum, self.runtime.device)
        if not all(math.isfinite(mean) for mean, _ in reduced.values()):
            self._stop_for_non_finite_loss()
        for name, (_, count) in reduced.items():
            assert count == self._examples, f"{count} losses of {name!r} for {self._examples} examples"
        named = {"train/loss" if name == "model" else f"train/loss/{name}": mean for name, (mean, _) in reduced.items()}
        rate = self._examples / max(1e-9, time.perf_counter() - self._mark)
        lr = next(iter(self.optimizers.values())).param_groups[0]["lr"]
        self.tracker.log({**self._where(), **named, "lr": lr, "examples_per_second": round(rate, 1)})
        self.tracker.show(**{name.removeprefix("train/"): f"{v:.4g}" for name, v in named.items()}, **self._shown(rate))
        self._pending.clear()
        self._examples = 0
        self._mark = time.perf_counter()

    def evaluate(self) -> None:
        """Evaluates every set, records the scores, and decides whether they are the best so far."""
        self.log()
        self.tracker.activity("evaluating")
        # An evaluation may draw random numbers (a generator's noise): it must not move the training's
        with self.average.applied(), forked_random_state(self.runtime, self.config.seed):
            self.scores = evaluation.evaluate_all(
                self.recipe, self.networks, self.data, self.runtime, self.config.eval_batch_size
            )
            if self.runtime.is_main:
                with evaluating(self.networks):
                    snapshot = self.recipe.snapshot(self.networks, self.data)
                if snapshot:
                    self.tracker.history.snapshots.append((self.step, checkpoint.plain(snapshot)))
        self.tracker.log({**self._where(), **self.scores, "data": self.data.source})
        epoch = f"epoch {self._where()['epoch']:g}/{self.recipe.epochs}"
        self.tracker.say(f"{epoch}  step {self.step:,}  {text_of(self.scores)}  ({self.data.source})")
        self.tracker.activity("")
        self._judge()
        self._mark = time.perf_counter()

    def save(self) -> None:
        """Publishes a checkpoint of the present state; of those that this run wrote, the last and the best are kept."""
        if not self.runtime.is_main or self.step in self.written:
            return
        states = {name: network.state_dict() for name, network in self.networks.items()}
        tensors = {"model.safetensors": checkpoint.network_tensors(states)}
        if (average := self.average.state()) is not None:
            tensors["ema.safetensors"] = checkpoint.network_tensors(average)
        state = {**self._where(), "scores": finite(self.scores), "best": finite(self.best), "data": self.data.source}
        try:
            path = checkpoint.publish(self.folder / "checkpoints", checkpoint.Checkpoint(self.step, tensors, state))
        except OSError as error:
            raise TrainingError(
                f"step {self.step}: checkpoint in {self.folder} not written: {error.strerror}"
            ) from error
        best_step = self.best["step"] if self.best else None
        for step in [step for step in self.written if step != best_step]:
            shutil.rmtree(self.written.pop(step), ignore_errors=True)
        self.written[self.step] = path

    def _judge(self) -> None:
        recipe = self.recipe
        if recipe.best is None:
            return
        score = self.scores[recipe.best]
        sign = 1 if recipe.best_is == "highest" else -1
        if self.best is None or sign * score > sign * self.best["scores"][recipe.best]:
            self.best = {"step": self.step, "scores": self.scores}
            self.evaluations_since_best = 0
            self.save()
            return
        self.evaluations_since_best += 1
        if recipe.patience is not None and self.evaluations_since_best >= recipe.patience:
            self.tracker.say(
                f"stopped early: {recipe.best} has not improved in {recipe.patience} evaluations since step "
                f"{self.best['step']:,}"
            )
            self.stopping = True

    def _check_best_is_a_score(self, best: str) -> None:
        names = []
        with evaluating(self.networks), self.runtime.autocast():
            for set_name, examples in self.data.evaluation_sets().items():
                scores = self.recipe.score(self.networks, self.data.inputs(examples, 0, 1))
                names += [f"{set_name}/{score}" for score in scores]
        if best not in names:
            raise UserError(f"--best {best}: no such score; there is {', '.join(names)}")

    def _stop_for_non_finite_loss(self) -> None:
        """Finds the first step whose loss is not finite, and whose examples they were, on any process."""
        found: list[Any] = [None, []]
        done = self.step - len(self._pending)
        for number, (epoch, index, losses) in enumerate(self._pending, done + 1):
            values = [torch.cat([evaluation.per_example(x, len(x), n) for x in parts]) for n, parts in losses.items()]
            bad = ~torch.isfinite(torch.stack(values)).all(0).cpu()
            if bad.any():
                found = [number, self.feed.local_numbers(epoch, index)[bad].tolist()]
                break
        everywhere = [f for f in self.runtime.gather_objects(found) if f[0] is not None]
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
        return {name: f"{self.scores[name]:.4g}", **shown} if name in self.scores else shown


def evaluation_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Optimizer steps between two evaluations; raises UserError where the recipe's field says no such thing."""
    steps = Interval.parse(recipe.evaluate_every, "--evaluate-every").in_steps(steps_per_epoch)
    if steps is None:
        raise UserError(f"--evaluate-every {recipe.evaluate_every!r}: must be in steps or epochs, so that runs agree")
    return steps


def make_optimizer(recipe: Recipe, name: str, network: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer; refuses one that needs more than a gradient."""
    optimizer = recipe.optimizer(name, network)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UserError(
            f"recipe {recipe.name}: LBFGS evaluates the loss many times a step; the loop takes one gradient"
        )
    return optimizer


def text_of(scores: dict[str, float]) -> str:
    """Scores for a person."""
    return "  ".join(f"{name} {value:.4g}" for name, value in scores.items())


def finite(value: Any) -> Any:
    """A copy in which what JSON can't hold (nan, inf) is null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def forked_random_state(runtime: Runtime, seed: int) -> Iterator[None]:
    """Within it torch's generators are seeded for an evaluation; afterwards they are as they were."""
    devices = [runtime.device] if runtime.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
