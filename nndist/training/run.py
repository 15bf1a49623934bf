"""One run from start to end: data, folder, plan, loop, figures, and what is said about it."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import RunConfig, check_choices
from ..data.sets import Data, hold_out
from ..distributed.blocks import local
from ..distributed.runtime import Runtime, launched_alone
from ..errors import Preempted, UserError, lost_a_process, of_the_disk
from ..metrics import text_of
from ..recipe import kept
from ..recipe.contract import Networks, Recipe
from ..runs import checkpoint, network_state
from ..runs.tracking import History, Tracker
from ..runs.wandb import WandbProcess, choose_mode
from .evaluation import evaluating
from .resume import Resumed, ended, lock, make_folder, on_main, plan, resume, state_bytes, write_description
from .trainer import Trainer, evaluation_steps


@dataclass
class Result:
    """What a training gave.

    history: the records of the run (see tracking.History). networks: by name, with the final weights, on the device; of
    a run with shard="fsdp" each process has its part of them, and checkpoints have them whole. scores: the last
    evaluation's by name, such as "test/accuracy" (0 to 1). best: {"step", "scores"} of the best evaluation, where the
    recipe names a score. folder: where all of it is written down. data: which data it was, such as "MNIST" or "MNIST
    sample". steps: optimizer steps that the run has behind it. seconds: of this call on the wall's clock. figures: the
    files that were drawn.
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


def run(recipe: Recipe, config: RunConfig) -> Result:
    """Trains `recipe` under `config`: plan, loop, figures.

    On all processes: raises UserError (what was given can't be meant), TrainingError (a loss that is not finite, a full
    disk) or Preempted (a signal, after a save), and gives the same scores on each.
    """
    began = time.perf_counter()
    trainer = begin(recipe, config)
    runtime, data = trainer.runtime, trainer.data
    if config.check:
        trainer.last_step = min(trainer.total_steps, 1)
    folder, exists = on_main(runtime, lambda: make_folder(recipe, config))
    trainer.folder = Path(folder)
    with contextlib.ExitStack() as stack:
        on_main(runtime, lambda: stack.enter_context(lock(trainer.folder)))
        on_main(runtime, lambda: checkpoint.preflight(trainer.folder, 2 * state_bytes(trainer)))
        notes, metrics_bytes, chain = resume(trainer) if exists else Resumed([], 0, "")
        if runtime.is_main:
            trainer.tracker = Tracker(
                trainer.folder,
                title=f"{recipe.name} [{data.source}]",
                steps=trainer.last_step,
                done=trainer.step,
                metrics_bytes=metrics_bytes,
                chain=chain,
                progress=config.progress and not config.check,
            )
            showing = Showing(trainer, [*notes, *trainer.tracker.problems])
            stack.callback(showing.end)
        stack.enter_context(signals(trainer))
        status = "failed"
        try:
            trainer.fit()
            keep_last_checkpoint(trainer)
            # a run that early stopping ended is at its end, one that --max-steps cut is not
            is_cut = trainer.step < trainer.total_steps and not trainer.stopped_early and not config.check
            status = "cut" if is_cut else "finished"
        except Preempted as stopped:
            status = "preempted"
            raise Preempted(stopped.signal, f"{stopped}{how_to_go_on(trainer)}") from None
        except RuntimeError as error:
            if trainer.signal and lost_a_process(error):  # all were told to stop, and another did so first
                raise Preempted(trainer.signal, f"stopped by signal {trainer.signal}; the last save stands") from error
            raise
        finally:
            runtime.done()
            trainer.let_writer_finish()
            # on a full disk the error that is under way says more than what follows from it
            with contextlib.nullcontext() if status in ("finished", "cut") else contextlib.suppress(OSError):
                trainer.tracker.close()
                if runtime.is_main:
                    showing.status = status
                    write_description(trainer, status)
        figures = draw(trainer) if config.figures else []
    networks = {name: runtime.unwrap(network) for name, network in trainer.engine.wrapped.items()}
    seconds = time.perf_counter() - began
    result = Result(
        history=trainer.tracker.history,
        networks=networks,
        scores=trainer.scores,
        best=trainer.best,
        folder=trainer.folder,
        data=data.source,
        steps=trainer.step,
        seconds=seconds,
        figures=figures,
    )
    if config.check:
        finish_check(trainer)
    elif runtime.is_main:
        print(conclusion(trainer, result), flush=True)
    return result


def begin(recipe: Recipe, config: RunConfig) -> Trainer:
    """Everything that is there before the first step; raises UserError, on all processes."""
    for settings in (recipe, config):
        check_choices(settings)
        settings.validate()
    evaluation_steps(recipe, 1)
    runtime = Runtime(
        precision=config.precision,
        cpu=config.cpu,
        timeout_seconds=config.timeout_seconds,
        threads=config.threads,
        deterministic=config.deterministic,
        gradient_compression=config.gradient_compression,
    )
    data = load_data(recipe, config, runtime)
    found = kept.kept(recipe.found())  # now: what the recipe sets on itself later is no business of its networks
    trainer = Trainer(recipe, config, runtime, data)
    trainer.found = found
    return trainer


def load_data(recipe: Recipe, config: RunConfig, runtime: Runtime) -> Data:
    """The recipe's data; one process of each machine may download, the others then read what it found."""
    data: Data | None = None
    error = ""
    for may_download in (True, False):
        if runtime.is_local_main == may_download:
            try:
                runtime.seed(config.seed)  # data that is drawn at random is the same on all processes
                data = recipe.data(config.data_config(download=may_download))
                data = data if recipe.hold_out is None else hold_out(data, recipe.hold_out)
            except UserError as mistake:
                error = str(mistake)
            except OSError as problem:
                error = of_the_disk(problem)
                if not error:
                    raise
        runtime.barrier()
    sizes = {"training": len(data.train), **{n: len(s) for n, s in data.evaluation_sets().items()}} if data else {}
    # one process alone need not know by what it could be compared
    known_by = data.train.fingerprint() if data and runtime.world_size > 1 else ""
    outcomes = runtime.gather_objects([error, [data.source if data else "", list(sizes.values())], known_by])
    for reason, *_ in outcomes:
        if reason:
            raise UserError(reason)
    for rank, (_, found, fingerprint) in enumerate(outcomes):
        if found != outcomes[0][1]:
            raise UserError(
                f"--data-dir {config.data_dir}: process 0 has {outcomes[0][1]} and process {rank} has {found}; "
                "put the same files on every machine"
            )
        if fingerprint != outcomes[0][2]:
            raise UserError(
                f"--data-dir {config.data_dir}: process {rank} has other training examples than process 0, of the same "
                "number; put the same files on every machine, and have data() draw nothing that is not from --seed"
            )
    assert data is not None
    for name, size in sizes.items():
        if not size:
            raise UserError(
                f"recipe {recipe.name}: the {name} set has 0 examples; have data() give at least one (it found "
                f"{data.source} in --data-dir {config.data_dir})"
            )
    return data


def keep_last_checkpoint(trainer: Trainer) -> None:
    """Sees to it that what a finished run has written is there; saves once more where somebody has removed it."""
    trainer.tracker.sync()
    root = trainer.folder / "checkpoints"
    saved, step = list(trainer.saved), trainer.step
    gone = on_main(trainer.runtime, lambda: [n for n in saved if not (root / checkpoint.folder_name(n)).is_dir()])
    if not gone:
        return
    trainer.saved = [number for number in trainer.saved if number not in gone]
    trainer.tracker.say(f"{root}: step {', '.join(map(str, gone))} was removed while the run was trained")
    if step in gone:
        trainer.save()
        trainer.finish_saving()
    if trainer.best is not None and trainer.best["step"] in gone and trainer.best["step"] != step:
        trainer.best = None


@contextlib.contextmanager
def signals(trainer: Trainer) -> Iterator[None]:
    """Within it SIGTERM, SIGINT and SIGUSR1 ask the run to save and stop after a step; a second SIGINT ends it."""

    def ask(number: int, frame: Any) -> None:
        if number == signal.SIGINT and trainer.signal == signal.SIGINT:
            os._exit(128 + number)
        trainer.signal = number

    if threading.current_thread() is not threading.main_thread():
        yield  # Python's handlers belong to the main thread
        return
    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, ask) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Showing:
    """What shows a run while it lives and afterwards: plan, run.json, report.html and W&B; on the main process.

    Whatever fails here costs one line, not the run.
    """

    def __init__(self, trainer: Trainer, notes: list[str]):
        self.trainer = trainer
        self.status = "running"
        config, folder = trainer.config, trainer.folder
        mode, line = choose_mode("off" if config.check else config.wandb, folder)
        text = "\n".join(f"{name:<8} {value}" for name, value in plan(trainer).items())
        notes = [launched_alone(), trainer.data.note, *trainer.notes, *notes, large_batch(trainer)]
        notes = [note for note in notes if note]
        print(
            "\n".join([text, *([f"W&B      {line}"] * bool(mode)), *(f"note     {note}" for note in notes)]), flush=True
        )
        write_description(trainer, self.status)
        self.sink = None
        if mode is not None:
            say = trainer.tracker.say
            self.sink = WandbProcess(folder, mode, say, project=config.wandb_project, artifact=config.wandb_artifact)
        self.with_report = config.report and not config.check
        self._next = 0.0
        trainer.on_evaluation = self.update

    def update(self) -> None:
        """After an evaluation; as seldom as it takes to cost less than a hundredth of the time."""
        began = time.perf_counter()
        if began < self._next:
            return
        write_description(self.trainer, self.status)
        self._write_report()
        cost = time.perf_counter() - began
        self._next = began + 100 * cost

    def end(self) -> None:
        """When the run has ended, whichever way, and its figures are drawn."""
        self._write_report()
        if self.sink is not None:
            self.sink.close(self.status)

    def _write_report(self) -> None:
        if not self.with_report:
            return
        try:
            from .. import report

            report.write_run(self.trainer.folder)
        except Exception as error:
            self.with_report = False
            self.trainer.tracker.say(f"report.html can't be written ({type(error).__name__}: {error}); the run goes on")
            if self.trainer.config.traceback:
                traceback.print_exc()


def large_batch(trainer: Trainer) -> str:
    """A note where a batch is to have more examples than there are."""
    size, num_examples = trainer.recipe.batch_size, len(trainer.data.train)
    if size <= num_examples:
        return ""
    return f"--batch-size {size:,}: there are {num_examples:,} examples, so that each step takes all of them"


def how_to_go_on(trainer: Trainer) -> str:
    """What ends the line of a run that a signal has stopped: the command that goes on with it, where there is one."""
    from ..report.run_page import command

    about = {"command": sys.argv, "world_size": trainer.runtime.world_size, "device": trainer.runtime.describe()}
    words = command(about, trainer.folder.name)
    return f"; go on with: {shlex.join(words)}" if words else ""


def draw(trainer: Trainer) -> list[Path]:
    """Draws and writes the figures on the main process; a figure that fails costs one line, not the run."""
    from .. import figures

    title = f"{trainer.recipe.name} on {trainer.data.source}"
    drawn = {"training": figures.training(trainer.tracker.history, title)}
    networks: Networks | None = {}
    with trainer.average.applied():
        if not trainer.sharding.divided or type(trainer.recipe).figures is not Recipe.figures:
            networks = trainer.sharding.whole(trainer.networks, trainer.recipe.networks)
        if not trainer.runtime.is_main or networks is None:
            return []
        try:
            with evaluating(networks):
                drawn |= trainer.recipe.figures(networks, trainer.data, trainer.tracker.history)
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


def finish_check(trainer: Trainer) -> None:
    """Loads the checkpoint that was saved, compares it bit by bit, each process its part, and removes the folder.

    Networks that are held whole are made anew for it, as a resumed run makes them.
    """
    path = trainer.folder / "checkpoints" / checkpoint.folder_name(trainer.step)
    saved = trainer.sharding.read(path, trainer.networks).tensors
    named = {name: network_state.own_tensors(network) for name, network in trainer.networks.items()}
    if trainer.sharding.divided:
        names = [f"{name}.{key}" for name, of_network in named.items() for key in of_network]
        held = checkpoint.network_tensors(named)
        checkpoint.check_tensors(held, saved["model.safetensors"], "model.safetensors")
        pairs = [(name, held[key], saved["model.safetensors"][key]) for name, key in zip(names, held, strict=True)]
    else:
        with torch.random.fork_rng(devices=[]):
            fresh = trainer.recipe.networks()
        network_state.load(fresh, saved)
        loaded = {name: network_state.own_tensors(network) for name, network in fresh.items()}
        pairs = [(f"{n}.{key}", t, loaded[n][key]) for n, of_network in named.items() for key, t in of_network.items()]
    problem = next(
        (name for name, ours, theirs in pairs if not torch.equal(local(ours).cpu(), local(theirs).cpu())), ""
    )
    problem = next(filter(None, trainer.runtime.gather_objects(problem)), "")
    if problem:
        raise UserError(f"recipe {trainer.recipe.name}: {problem} did not come back from its checkpoint")
    if not trainer.runtime.is_main:
        return
    shutil.rmtree(trainer.folder)
    steps = f"{trainer.step} step{'s' * (trainer.step > 1)}"
    print(f"check passed: {steps}, {text_of(trainer.scores)} ({trainer.data.source}), saved and loaded", flush=True)


def conclusion(trainer: Trainer, result: Result) -> str:
    """The last lines: scores, the best model, the time, and where everything is."""
    lines = [f"result   {text_of(result.scores)}  ({result.data}, {result.steps:,} steps, {result.seconds:.1f} s)"]
    if result.best is not None:
        lines.append(f"best     {text_of(result.best['scores'])}  (step {result.best['step']:,}, {result.data})")
    if (how := ended(trainer)) and not trainer.stopped_early:
        lines.append(f"cut      {how}; the same command without --max-steps goes on")
    root = trainer.folder / "checkpoints"
    lines += [f"weights  {checkpoint.weights_file(root / checkpoint.folder_name(step))}" for step in trainer.saved]
    lines += [f"figure   {path}" for path in result.figures]
    page = trainer.folder / "report.html"
    if trainer.config.report and page.exists():  # it may be that it can't be written
        lines.append(f"report   {page}")
    return "\n".join(lines)
