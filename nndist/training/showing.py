"""What a person sees of a run during training and afterwards: plan, report, W&B, figures, the last lines."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .. import machine
from ..distributed.runtime import launched_alone
from ..metrics import text_of
from ..progress import fitted
from ..recipe import kept
from ..recipe.contract import Networks, Recipe
from ..runs import checkpoint
from ..runs.sink import SinkProcess
from ..runs.trackers import NAMES, TrackerProcess, where
from ..runs.tracking import History
from ..runs.wandb import WandbProcess, choose_mode
from ..stores import redacted
from .baseline import comparison
from .description import ended, plan, write_description
from .evaluation import evaluating, forked_random_state

if TYPE_CHECKING:
    from .trainer import Trainer


@dataclass
class Result:
    """The result of a training.

    history: the records of the run (see tracking.History). networks: by name, with the final weights, on the device;
    with shard="fsdp" each process has its shard, and checkpoints have full weights. scores: the last evaluation's by
    name, such as "test/accuracy" (0 to 1); those of a test set evaluated once, after training, are of the weights that
    validation chose. best: {"step", "scores"} of the best evaluation, if the recipe names a score. folder: the run's
    folder. data: which data it was, such as "MNIST" or "MNIST sample". steps: optimizer steps of the run so far.
    seconds: wall-clock time of this call. figures: the files that were drawn.
    """

    history: History
    networks: dict[str, nn.Module]
    scores: dict[str, float]
    best: dict[str, Any] | None
    folder: Path
    data: str
    steps: int
    seconds: float
    figures: list[Path] = field(default_factory=list)


class Showing:
    """Shows a run during training and afterwards: plan, run.json, report.html and W&B; on the main process.

    A failure here costs one line, not the run.
    """

    def __init__(self, trainer: Trainer, notes: list[str]):
        self.trainer = trainer
        self.status = "running"
        config, folder = trainer.config, trainer.folder
        self.trackers = [] if config.check else list(config.track)
        mode, line = choose_mode("off" if config.check else config.wandb, folder)
        text = fitted("\n".join(f"{name:<8} {value}" for name, value in plan(trainer).items()))
        about_data = trainer.data.note.replace("; ", f"\n{'':9}")  # what is so, and what to do, each on its line
        shown = [*([f"W&B      {line}"] * bool(mode)), *(f"track    {where(name, folder)}" for name in self.trackers)]
        notes = [launched_alone(), about_data, *trainer.notes, *notes, large_batch(trainer), not_kept(trainer)]
        notes = [note for note in notes if note]
        print(
            "\n".join([text, *shown, *(fitted(f"note     {note}") for note in notes)]),
            flush=True,
        )
        write_description(trainer, self.status)
        self.sinks: list[SinkProcess] = []
        if mode is not None:
            settings = {name: getattr(config, f"wandb_{name}") for name in ("project", "artifact", "alert")}
            self._start("W&B", lambda: WandbProcess(folder, mode, trainer.tracker.say, **settings))
        for name in self.trackers:
            self._start(NAMES[name], partial(TrackerProcess, name, folder, trainer.tracker.say))
        self.with_report = config.report and not config.check
        self._next = 0.0
        self._said: set[str] = set()  # what can't be written: already reported
        trainer.on_evaluation = self.update

    def _start(self, name: str, make: Callable[[], SinkProcess]) -> None:
        try:
            self.sinks.append(make())
        except OSError as error:
            what = error.filename or self.trainer.folder
            self.trainer.tracker.say(f"{name}: can't be started ({what}: {error.strerror}); the run continues")

    def update(self) -> None:
        """Updates run.json and the report after an evaluation, but spends at most about 1 % of the time on it."""
        began = time.perf_counter()
        if began < self._next:
            return
        try:
            write_description(self.trainer, self.status)
        except OSError as error:
            self._say_once(f"run.json can't be written ({error.strerror}); it is tried again at the next evaluation")
        self._write_report()
        cost = time.perf_counter() - began
        self._next = began + 100 * cost

    def end(self) -> None:
        """Writes the last report and closes W&B, however the run has ended; called after its figures are drawn."""
        self._write_report()
        for sink in self.sinks:
            sink.close(self.status)

    def _write_report(self) -> None:
        if not self.with_report:
            return
        try:
            from .. import report

            report.write_run(self.trainer.folder)
        except Exception as error:
            self.with_report = isinstance(error, OSError)  # which may pass: a page that another program has open
            self._say_once(f"report.html can't be written ({type(error).__name__}: {error}); the run continues")
            if self.trainer.config.traceback:
                traceback.print_exc()

    def _say_once(self, line: str) -> None:
        what = line.partition(" ")[0]
        if what not in self._said:
            self._said.add(what)
            self.trainer.tracker.say(line)


def large_batch(trainer: Trainer) -> str:
    """A note if the batch size exceeds the number of examples, else ""."""
    size, num_examples = trainer.recipe.batch_size, len(trainer.data.train)
    if size <= num_examples:
        return ""
    return f"--batch-size {size:,}: there are {num_examples:,} examples, so each step takes all of them"


def not_kept(trainer: Trainer) -> str:
    """A note if `data` set an attribute that a loaded run will lack where it is needed, else ""."""
    left_out = trainer.found.left_out if isinstance(trainer.found, kept.Kept) else {}
    return kept.missed(left_out, type(trainer.recipe))


def how_to_resume(trainer: Trainer) -> str:
    """The end of the line of a run that a signal stopped: the command that resumes it, if known."""
    from ..report.run_tables import command

    about = {
        "command": [redacted(word) for word in sys.argv],
        "world_size": trainer.runtime.world_size,
        "device": trainer.runtime.describe(),
    }
    words = command(about, trainer.folder.name)
    return f"; resume with: {machine.command_line(words)}" if words else ""


def preview(trainer: Trainer) -> None:
    """Draws what the recipe shows of its data before the first step, on the main process; a failure costs one line."""
    from .. import figures

    if type(trainer.recipe).preview is Recipe.preview:
        return
    try:
        with forked_random_state(trainer.runtime, trainer.config.seed):
            drawn = trainer.recipe.preview(trainer.data)
    except Exception as error:
        if trainer.config.check or trainer.config.traceback:
            raise
        print(f"preview of the recipe failed ({type(error).__name__}: {error}); --traceback shows where", flush=True)
        return
    for path in figures.save(drawn, trainer.folder / "figures"):
        print(f"figure   {path}", flush=True)


def draw(trainer: Trainer) -> list[Path]:
    """Draws the figures, of the weights that were tested, and saves them on the main process; a collective.

    Returns the files; none on the other processes. If the recipe's figures fail, one line says so and the run
    continues; with --check or --traceback their exception is raised.
    """
    from .. import figures

    title = f"{trainer.recipe.name} on {trainer.data.source}"
    drawn = {"training": figures.training(trainer.tracker.history, title)}
    networks: Networks | None = {}
    with trainer.chosen_weights(), trainer.average.applied():
        # gathering shards is expensive: only for a recipe that draws figures of its own
        if not trainer.sharding.is_sharded or type(trainer.recipe).figures is not Recipe.figures:
            networks = trainer.sharding.whole(trainer.networks, trainer.recipe.networks)
        if not trainer.runtime.is_main or networks is None:
            return []
        try:
            with evaluating(networks):
                own = trainer.recipe.figures(networks, trainer.data, trainer.tracker.history)
            drawn |= own
            if type(trainer.recipe).preview is Recipe.preview:
                drawn = figures.training_images(trainer.data, trainer.recipe.name) | drawn
        except Exception as error:
            if trainer.config.check or trainer.config.traceback:
                raise
            print(
                f"figures of the recipe failed ({type(error).__name__}: {error}); --traceback shows where", flush=True
            )
    for text in drawn.values():
        if isinstance(text, str):
            print(text, flush=True)
    return figures.save(drawn, trainer.folder / "figures")


def conclusion(trainer: Trainer, result: Result) -> str:
    """The last lines: scores, the best model, the time, and where everything is."""
    how_long = f"{result.data}, {result.steps:,} steps, {result.seconds:.1f} s"
    at_end = tuple(f"{name}/" for name in trainer.data.sets_at_end())
    in_training = {name: value for name, value in result.scores.items() if not name.startswith(at_end)}
    chosen = result.best["scores"] if result.best is not None else in_training
    if not at_end:
        lines = [f"result   {text_of(result.scores)}  ({how_long})"]
    else:  # the test set's scores are those of the chosen weights, which may not be the last
        tested = {name: value for name, value in result.scores.items() if name.startswith(at_end)}
        which = "best" if result.best is not None and result.best["step"] == trainer.tested else "last"
        lines = [
            f"result   {text_of(tested)}  ({result.data}, {which} weights, of step {trainer.tested or 0:,})",
            f"last     {text_of(in_training)}  ({how_long})",
        ]
        chosen = {name: value for name, value in chosen.items() if not name.startswith(at_end)}
    if result.best is not None:
        lines.append(f"best     {text_of(chosen)}  (step {result.best['step']:,}, {result.data})")
    if trainer.baseline:
        ours = result.best["scores"] if result.best is not None else result.scores
        compared = comparison(trainer.baseline, ours) or "has none of these scores"
        lines.append(f"baseline {compared}  ({trainer.baseline['run']}, {trainer.baseline['data']})")
    if (how := ended(trainer)) and not trainer.best.stopped:
        lines.append(f"cut      {how}; the same command without --max-steps resumes it")
    lines = [fitted(line) for line in lines]
    root = trainer.folder / "checkpoints"
    lines += [
        f"weights  {checkpoint.weights_file(root / checkpoint.folder_name(step))}" for step in trainer.saving.steps
    ]
    lines += [f"figure   {path}" for path in result.figures]
    page = trainer.folder / "report.html"
    if trainer.config.report and page.exists():  # writing it may have failed
        lines.append(f"report   {page}")
    return "\n".join(lines)
