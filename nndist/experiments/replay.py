"""A run taken again from one of its checkpoints, up to a step: a run is a pure function of its description.

Nothing here changes the run: it is replayed on a trainer of its own, which saves and records nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import RunConfig
from ..data.feed import GlobalBatch
from ..distributed.runtime import on_main
from ..errors import TrainingError, UserError
from ..files import finite
from ..recipe.contract import Recipe
from ..recipe.fields import from_json, from_text, hints_of, to_json
from ..runs import checkpoint, network_state, optimizer_state
from ..runs.reading import mapping
from ..runs.records import FILE, Record, Records, without_times
from ..runs.tracking import NullTracker
from ..trained.loaded_run import LoadedRun
from ..training import resume
from ..training.run import begin
from ..training.step import Losses, Step
from ..training.trainer import Trainer

NOT_OF_A_REPLAY = {"run", "runs_dir", "local_runs_dir", "resume", "check", "find_lr", "find_batch", "compare_with"}
NOT_OF_A_REPLAY |= {"track", "wandb_artifact", "wandb_alert", "profile", "notify", "recheck_every"}
"""Settings that say where a run is written and what is shown of it."""


Observer = Callable[[Trainer, GlobalBatch, Any], Losses]
"""Takes the trainer's step: `(trainer, batch, due)` to the losses."""


class Reached(Exception):
    """The replay has taken its last step."""


class _Observed:
    """A step whose call is somebody else's."""

    def __init__(self, step: Step, call: Callable[[GlobalBatch, Any], Losses]):
        self._step, self._call = step, call

    def __call__(self, batch: GlobalBatch, due: Any = None) -> Losses:
        return self._call(batch, due)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)


class RecordKeeper(NullTracker):
    """Keeps the records of a replay in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Record] = []

    def log(self, record: Record) -> None:
        self.records.append(finite(record))
        self.history.columns.append(record)


class Replay:
    """A run's training, restored from its newest intact checkpoint before a step.

    folder: the run's. trainer: the training. began: the step of the checkpoint, 0 without one. notes: what may make
    bits differ. Raises UserError if there is no run, its recipe is not trusted, or its data have changed. A collective.

    changes: fields of the recipe that take other values, as texts. root: the folder of checkpoints, if not the run's.
    """

    def __init__(
        self,
        folder: Path,
        before: int,
        *,
        trust: bool = False,
        changes: Mapping[str, str] | None = None,
        root: Path | None = None,
    ):
        self.folder = folder
        self.run = LoadedRun(folder, trust=trust)
        self.notes = self.run.notes
        self.about = self.run.about
        recipe = with_fields(self.run, changes or {})
        config = settings_of(self.run)
        self.trainer = begin(recipe, config)
        self.trainer.folder = Path(tempfile.gettempdir())  # nothing is written
        self.recorded = RecordKeeper()
        self.trainer.tracker = self.recorded
        self.trainer.saving.save = lambda: None  # type: ignore[method-assign]
        self.trainer.test = lambda: None  # type: ignore[method-assign]
        self.trainer.config.allow_change = ("data", "source", *(changes or {})) if changes else ()
        on_main(self.trainer.runtime, lambda: resume.check_unchanged(self.trainer, self.about))
        self.began = self._restore(before, root or folder / "checkpoints")
        then = mapping(self.about)
        ours = {"world_size": self.trainer.runtime.world_size, "threads": self.trainer.runtime.threads}
        self.notes += [
            f"{name.replace('_', ' ')} {then.get(name)} in the run, {now} now: bits may differ"
            for name, now in ours.items()
            if then.get(name) != now
        ]
        self.notes += device_differs(str(then.get("device")), self.trainer.runtime.describe())
        if (was := mapping(self.about.get("versions")).get("torch")) != torch.__version__:
            self.notes.append(f"torch {was} in the run, {torch.__version__} now: bits may differ")

    def _restore(self, before: int, root: Path) -> int:
        """Restores the newest intact checkpoint of a step before `before`; returns its step, or 0 if there is none."""
        trainer = self.trainer
        steps = on_main(trainer.runtime, lambda: [n for n, _ in checkpoint.checkpoints_in(root) if n < before])
        for step in reversed(steps):
            problem = ""
            try:
                saved = checkpoint.check_state(
                    trainer.sharding.read(root / checkpoint.folder_name(step), trainer.networks)
                )
                resume.restore(trainer, saved)
            except checkpoint.DamagedCheckpoint as damage:
                problem = str(damage)
            # each process reads its own copy or shards: a checkpoint damaged for one is passed over by all
            problem = next(filter(None, trainer.runtime.gather_objects(problem)), "")
            if not problem:
                return step
            self.notes.append(f"damaged checkpoint: {problem}")
        return 0

    def advance(self, last: int, observe: Observer | None = None, each: Callable[[], None] | None = None) -> None:
        """Trains up to and including step `last` and what follows it before the next; `observe` takes step `last`.

        each: called before every step and, except at the end of the run, after the last.

        Raises UserError if the run has no such step, and TrainingError as a training does, except for a loss of the
        observed step that is not finite.
        """
        trainer = self.trainer
        if not trainer.step < last <= trainer.total_steps:
            at = f", and this replay is at {trainer.step:,}" if trainer.step else ""
            raise UserError(f"--step {last}: the run has steps 1 to {trainer.total_steps:,}{at}")
        take_step, real = type(trainer).take_step, trainer.optimizer_step

        def take(batch: GlobalBatch) -> bool:
            if each is not None:
                each()
            if trainer.step >= last:
                raise Reached
            if observe is not None and trainer.step + 1 == last:
                trainer.optimizer_step = _Observed(real, partial(observe, trainer))  # type: ignore[assignment]
            return take_step(trainer, batch)

        trainer.last_step = max(trainer.last_step, last)
        trainer.take_step = take  # type: ignore[method-assign]
        try:
            with contextlib.suppress(Reached):
                trainer.fit()
        except TrainingError:
            if observe is None or trainer.step < last:
                raise
        finally:
            del trainer.take_step
            trainer.optimizer_step = real

    def published(self, scratch: Path) -> Path:
        """Saves the replay's state as a checkpoint in a folder that all processes see; returns its root."""
        trainer = self.trainer
        trainer.folder = scratch
        trainer.saving.steps = []
        type(trainer.saving).save(trainer.saving)
        trainer.saving.wait()
        return scratch / "checkpoints"

    def records_differ(self) -> tuple[int, str]:
        """How many of the replay's records the run has too, bit for bit, and the first that differs, or "".

        On the main process; elsewhere (0, "").
        """
        if not self.trainer.runtime.is_main:
            return 0, ""
        theirs = Records.of_file(self.folder / FILE).rows()
        by_step: dict[int, list[Record]] = {}
        for record in theirs:
            by_step.setdefault(record["step"], []).append(without_times(record))
        same = 0
        for record in self.recorded.records:
            ours = without_times(record)
            if ours in by_step.get(record["step"], []):
                same += 1
            elif record["step"] in by_step:
                return same, f"the record of step {record['step']:,}"
        return same, ""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Weights, EMA and optimizer state by file and name, as a checkpoint has them; {} if they are sharded."""
        trainer = self.trainer
        if trainer.sharding.is_sharded:
            return {}
        found = network_state.files_of(trainer.networks, trainer.names)
        if (average := trainer.average.state()) is not None:
            found["ema.safetensors"] = checkpoint.network_tensors(average)
        found["optimizer.safetensors"], _ = optimizer_state.optimizer_state(trainer.optimizers, trainer.networks)
        return found

    def checkpoint_differs(self, step: int) -> str | None:
        """The first tensor that differs in bits from the run's checkpoint of this step; "" if none does.

        None if there is no such checkpoint.
        """
        path = self.folder / "checkpoints" / checkpoint.folder_name(step)
        if not path.is_dir():
            return None
        try:
            saved = checkpoint.read(path).tensors
        except checkpoint.DamagedCheckpoint as damage:
            return f"damaged: {damage}"
        for file, tensors in self.tensors().items():
            for name, tensor in tensors.items():
                theirs = saved.get(file, {}).get(name)
                if theirs is None or not same_bits(tensor.detach().cpu(), theirs):
                    return f"{file}: {name}"
        return ""


def device_differs(then: str, now: str) -> list[str]:
    """A note if a run's device, as run.json describes it, is of another kind than this replay's."""
    kinds = [said.partition(" x ")[0] for said in (then, now)]
    return [f"device {kinds[0]} in the run, {kinds[1]} now: bits may differ"] if kinds[0] != kinds[1] else []


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors have the same bits; NaNs included."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    first, second = (t.contiguous().reshape(-1).view(torch.uint8) for t in (ours, theirs))
    return torch.equal(first, second)


def with_fields(run: LoadedRun, changes: Mapping[str, str]) -> Recipe:
    """The run's recipe as its command made it, some fields with other values; raises UserError."""
    recipe = dataclasses.replace(run.recipe)
    hints = hints_of(type(recipe))
    values = {}
    for name, text in changes.items():
        field = name.replace("-", "_")
        if field not in recipe.fields():
            raise UserError(f"--vary {name}={text}: the recipe has no such field; {', '.join(sorted(recipe.fields()))}")
        now = getattr(recipe, field)
        try:
            values[field] = from_text(text, hints.get(field), now)
        except ValueError:
            raise UserError(f"--vary {name}={text}: is not a value of this field; the run has {to_json(now)}") from None
    return dataclasses.replace(recipe, **values) if values else recipe


def settings_of(run: LoadedRun) -> RunConfig:
    """The settings that the run was trained with, for a training that shows and writes nothing; raises UserError."""
    saved, hints = mapping(run.about.get("settings")), hints_of(RunConfig)
    known = {field.name for field in dataclasses.fields(RunConfig)} - NOT_OF_A_REPLAY
    values = {name: from_json(value, hints.get(name)) for name, value in saved.items() if name in known}
    if "data_dir" in values:
        values["data_dir"] = Path(values["data_dir"])
    threads = run.about.get("threads")
    values |= {"progress": False, "figures": False, "report": False, "wandb": "off", "time": "none"}
    if not is_there(values.get("device")):
        values["device"] = "auto"
    if values.get("threads") is None and isinstance(threads, int):
        values["threads"] = threads
    try:
        config = RunConfig(**values)
        config.validate()
    except (TypeError, UserError) as error:
        raise UserError(f"{run.folder}/run.json: settings: {error}; restore it from a copy") from error
    return config


def is_there(device: Any) -> bool:
    """Whether this machine has the device that a run asked for."""
    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.get(device, True)


def summary(replay: Replay) -> dict[str, Any]:
    """What a replay has shown so far: records and checkpoint compared in bits, on the main process."""
    same, differs = replay.records_differ()
    against = replay.checkpoint_differs(replay.trainer.step)
    return {
        "from_step": replay.began,
        "step": replay.trainer.step,
        "records_identical": same,
        "record_differs": differs,
        "checkpoint": "none" if against is None else against or "identical",
    }
