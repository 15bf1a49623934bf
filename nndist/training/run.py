"""One run from start to end: data, folder, plan, loop, figures, conclusion."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..data.folds import one_fold
from ..data.identity import same_examples
from ..data.parts import hold_out
from ..data.sets import Data
from ..distributed.runtime import Runtime, on_main
from ..errors import NotFiniteLoss, Preempted, TrainingError, UserError, first_line, lost_a_process, of_the_disk
from ..files import finite
from ..recipe import kept
from ..recipe.contract import Recipe
from ..recipe.fields import check_fields
from ..runs import checkpoint, checkpoint_writer
from ..runs.python_undo import unnoticed_reading
from ..runs.storage import WAIT_SECONDS, Storage
from ..runs.tracking import Tracker
from .baseline import baseline_of
from .checking import finish_check
from .description import write_description
from .folder import folder_needed, lock, make_folder
from .layers import Outputs, noting_outputs, summary
from .profiling import Profile
from .resume import Resumed, resume
from .saving import state_bytes
from .showing import Result, Showing, conclusion, draw, how_to_resume, preview
from .stopping import check_stopping, notify, signals
from .trainer import Trainer, evaluation_steps


def run(recipe: Recipe, config: RunConfig) -> Result:
    """Trains `recipe` under `config`: plan, loop, figures.

    Raises UserError (invalid input), TrainingError (a loss that is not finite, a full disk) or Preempted (a signal,
    after a save), on all processes; the scores are identical on all.
    """
    began = time.perf_counter()
    if config.summary:
        config = dataclasses.replace(config, check=True)
    outputs: Outputs = {}
    trainer = begin(recipe, config)
    runtime, data = trainer.runtime, trainer.data
    if config.check:
        trainer.last_step = min(trainer.total_steps, 1)
    trainer.baseline = on_main(runtime, lambda: baseline_of(config.compare_with))
    folder, exists, *fetched = on_main(runtime, lambda: find_folder(trainer))
    trainer.folder = Path(folder)
    with contextlib.ExitStack() as stack:
        if runtime.is_main:
            stack.enter_context(folder_needed(trainer.folder))
        on_main(runtime, lambda: stack.enter_context(lock(trainer.folder)))
        stack.callback(lambda: trainer.storage.end(trainer.status, seconds_to_send(trainer)))
        on_main(runtime, lambda: checkpoint_writer.preflight(trainer.folder, 2 * state_bytes(trainer)))
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
            trainer.storage.say = trainer.tracker.say
            showing = Showing(trainer, [*fetched, *notes, *trainer.tracker.problems])
            stack.callback(showing.end)
            if config.figures and not trainer.step:
                preview(trainer)
        stack.enter_context(signals(config.preempt_signal, trainer.ask_to_stop, lambda: trainer.signal))
        if config.summary:
            stack.enter_context(noting_outputs(trainer.networks, outputs))
        trainer.watch.begin(trainer.folder)
        status = "failed"
        try:
            trainer.fit()
            keep_last_checkpoint(trainer)
            # a run that early stopping ended is finished, one that --max-steps cut is not
            is_cut = trainer.step < trainer.total_steps and not trainer.best.stopped and not config.check
            status = "cut" if is_cut else "finished"
        except Preempted as stopped:
            status, trainer.problem = "preempted", str(stopped)
            raise Preempted(stopped.signal, f"{stopped}{how_to_resume(trainer)}") from None
        except RuntimeError as error:
            if trainer.signal and lost_a_process(error):  # all were told to stop, and another process stopped first
                by, number = trainer.asked_by(trainer.signal)
                raise Preempted(number, f"stopped by {by}; the last save is kept") from error
            where = trainer.watch.explain(error) if lost_a_process(error) else ""
            trainer.problem = f"{first_line(error)}; {where}" if where else first_line(error)
            if where:
                raise RuntimeError(trainer.problem) from error
            raise
        except NotFiniteLoss as error:
            trainer.problem = str(error)
            more = "" if config.check else f"; nndist replay {trainer.folder} --step {error.step} shows where"
            raise TrainingError(f"{error}{more}") from error
        except BaseException as error:
            told = isinstance(error, UserError | TrainingError)
            trainer.problem = str(error) if told else f"{type(error).__name__}: {first_line(error)}"
            raise
        finally:
            runtime.done()
            trainer.watch.end()
            trainer.saving.let_writer_finish()
            # on a full disk the error being raised says more than those that follow from it
            with contextlib.nullcontext() if status in ("finished", "cut") else contextlib.suppress(OSError):
                trainer.write_profile(last=True)  # where a signal or early stopping ended the run within its steps
                trainer.tracker.close()
                if runtime.is_main:
                    showing.status = trainer.status = status
                    write_description(trainer, status)
                    tell(trainer, status)
        figures = draw(trainer) if config.figures else []
    networks = {name: runtime.unwrap(network) for name, network in trainer.optimizer_step.wrapped.items()}
    seconds = time.perf_counter() - began
    result = Result(
        history=trainer.tracker.history,
        networks=networks,
        scores=trainer.scores,
        best=trainer.best.record,
        folder=trainer.folder,
        data=data.source,
        steps=trainer.step,
        seconds=seconds,
        figures=figures,
    )
    if config.check:
        finish_check(trainer)
        if config.summary and runtime.is_main:
            print(f"\n{summary(trainer.networks, outputs)}", flush=True)
    elif runtime.is_main:
        print(conclusion(trainer, result), flush=True)
    return result


def begin(recipe: Recipe, config: RunConfig) -> Trainer:
    """The trainer, ready for its first step; raises UserError on all processes."""
    for settings in (recipe, config):
        check_fields(settings)  # even if a recipe's own `validate` does not call the inherited one
        settings.validate()
    evaluation_steps(recipe, 1)
    check_stopping(config)
    Profile(config.profile, config.profile_ranks, rank=0)
    runtime = Runtime(
        precision=config.precision,
        cpu=config.cpu,
        device=config.device,
        tf32=config.tf32,
        timeout_seconds=config.timeout_seconds,
        threads=config.threads,
        deterministic=config.deterministic,
        cudnn_benchmark=config.cudnn_benchmark,
        gradient_compression=config.gradient_compression,
        weight_compression=config.weight_compression,
    )
    data = load_data(recipe, config, runtime)
    found = kept.kept(recipe.found())  # now: the networks do not depend on what the recipe sets later
    trainer = Trainer(recipe, config, runtime, data)
    trainer.found = found
    trainer.begin()
    return trainer


def load_data(recipe: Recipe, config: RunConfig, runtime: Runtime) -> Data:
    """The recipe's data; one process of each machine may download, the others then read its files."""
    data: Data | None = None
    error = ""
    for may_download in (True, False):
        if runtime.is_local_main == may_download:
            try:
                runtime.seed(config.seed)  # randomly drawn data must be identical on all processes
                data = recipe.data(config.data_config(download=may_download))
                data = data if recipe.hold_out is None else hold_out(data, recipe.hold_out)
                data = data if recipe.fold is None else one_fold(data, recipe.fold)
            except UserError as mistake:
                error = str(mistake)
            except OSError as problem:
                error = of_the_disk(problem)
                if not error:
                    raise
        runtime.barrier()
    sizes = {"training": len(data.train), **{n: len(s) for n, s in data.evaluation_sets().items()}} if data else {}
    # a single process has nothing to compare with
    own: dict[str, str] = {}
    if data and runtime.world_size > 1:
        with unnoticed_reading(recipe, data.given()):
            own = data.fingerprints()
    outcomes = runtime.gather_objects([error, [data.source if data else "", list(sizes.values())], own])
    for reason, *_ in outcomes:
        if reason:
            raise UserError(reason)
    for rank, (_, found, fingerprints) in enumerate(outcomes):
        if found != outcomes[0][1]:
            raise UserError(
                f"--data-dir {config.data_dir}: process 0 has {outcomes[0][1]} and process {rank} has {found}; "
                "put the same files on every machine"
            )
        if differing := [
            name for name, known in fingerprints.items() if not same_examples(known, outcomes[0][2].get(name, ""))
        ]:
            which = "training" if differing[0] == "train" else differing[0]
            raise UserError(
                f"--data-dir {config.data_dir}: process {rank} has as many {which} examples as process 0, but "
                "different ones; put the same files on every machine, sort what comes from a set or a folder, and let "
                "data() draw only from the generators that --seed seeds"
            )
    assert data is not None
    for name, size in sizes.items():
        if not size:
            raise UserError(
                f"recipe {recipe.name}: the {name} set has 0 examples; data() must return at least one (it found "
                f"{data.source} in --data-dir {config.data_dir})"
            )
    return data


def find_folder(trainer: Trainer) -> list[Any]:
    """The run's folder, whether it holds a run to resume, and notes; raises UserError.

    A run that is also kept in a store is first fetched from it; from then on, what its folder holds is sent there.
    """
    recipe, config = trainer.recipe, trainer.config
    notes: list[str] = []

    def fetch(folder: Path) -> None:
        trainer.storage = Storage(config.url_of(recipe.name, folder.name))
        notes.extend(trainer.storage.fetch(folder))

    is_kept = config.url_of() and not config.check
    return [*make_folder(recipe, config, fetch if is_kept else None), *notes]


def seconds_to_send(trainer: Trainer) -> float:
    """How long a run may wait at its end for what is still to be sent; the other processes wait, too."""
    return WAIT_SECONDS if trainer.runtime.world_size == 1 else 0.8 * trainer.config.timeout_seconds


def keep_last_checkpoint(trainer: Trainer) -> None:
    """Makes sure that the checkpoints of a finished run still exist; saves again if the last was removed."""
    trainer.tracker.sync()
    root = trainer.folder / "checkpoints"
    saved, step = list(trainer.saving.steps), trainer.step

    def is_gone(number: int) -> bool:
        return not (root / checkpoint.folder_name(number)).is_dir() and not trainer.storage.holds(number)

    gone = on_main(trainer.runtime, lambda: [number for number in saved if is_gone(number)])
    if not gone:
        return
    trainer.saving.steps = [number for number in trainer.saving.steps if number not in gone]
    trainer.tracker.say(f"{root}: step {', '.join(map(str, gone))} was removed while the run was trained")
    if step in gone:
        trainer.saving.save()
        trainer.saving.wait()
    if trainer.best.record is not None and trainer.best.record["step"] in gone and trainer.best.record["step"] != step:
        trainer.best.record = None


def tell(trainer: Trainer, status: str) -> None:
    """Runs `--notify`, on the main process."""
    scores = json.dumps(finite(trainer.scores))
    about = {"recipe": trainer.recipe.name, "run": str(trainer.folder), "step": str(trainer.step), "scores": scores}
    notify(trainer.config.notify, trainer.tracker.say, status=status, problem=trainer.problem, **about)
